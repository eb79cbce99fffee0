"""FSDP2 on one device: the losses and the sharpness of a sharded LLaMA against those of a plain one."""

from __future__ import annotations

import copy
import time

import torch
import torch.distributed as dist
from _measure import Ratio, synchronize
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from blockwise_lr import clip_grad_norm_by_block, measure_sharpness, param_groups
from blockwise_lr.fp32 import fp32_precision
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig
from blockwise_lr.train.presets import get_preset
from gpu.run_parts import Task

FURTHEST = 1e-3  # nats
TINY = ModelConfig("llama", 32, 2, 2, vocab_size=128, context=32)


@fp32_precision("ieee")
def measure(task: Task) -> None:
    """Train LLaMA-134M for some steps in fp32, plain and sharded over one process.

    Raises:
        SystemExit: losses or sharpness differ.
    """
    shape = TINY if task.tiny else get_preset("llama-134m-minipile").model
    steps, rows = (4, 2) if task.tiny else (20, 8)
    ids = torch.randint(shape.vocab_size, (steps, rows, shape.context), device=task.device)
    start = build_model(shape, seed=0).to(task.device).train()

    def run(sharded: bool) -> tuple[list[float], dict[str, float], float]:
        model = copy.deepcopy(start)
        if sharded:
            mesh = init_device_mesh(task.device, (1,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            if not all(isinstance(p, DTensor) for p in model.parameters()):
                raise RuntimeError("fully_shard left parameters that are not sharded")
        optimizer = torch.optim.AdamW(param_groups(model, lr=1e-4), lr=1e-4, fused=True)
        losses, times = [], []
        for each in ids:
            synchronize()
            begin = time.perf_counter()
            loss = model(input_ids=each, labels=each).loss
            loss.backward()
            clip_grad_norm_by_block(model, 1.0, blocks=optimizer.param_groups)
            optimizer.step()
            optimizer.zero_grad()
            synchronize()
            times.append(time.perf_counter() - begin)
            losses.append(loss.item())
        report = measure_sharpness(model, {"input_ids": ids[0], "labels": ids[0]})
        sharpness = {block.value: estimate.mean for block, estimate in report.items()}
        return losses, sharpness, sorted(times)[len(times) // 2]

    plain = run(sharded=False)
    task.record.add(settings={"shape": vars(shape), "steps": steps}, losses={"plain": plain[0]})
    backend = "nccl" if task.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = run(sharded=True)
    finally:
        dist.destroy_process_group()
    apart = max(abs(a - b) for a, b in zip(plain[0], sharded[0]))
    errors = {block: abs(sharded[1][block] / value - 1) for block, value in plain[1].items()}
    task.record.add(
        losses={"plain": plain[0], "fsdp2": sharded[0]},
        sharpness={"plain": plain[1], "fsdp2": sharded[1]},
        largest_difference=apart,
        largest_sharpness_error=max(errors.values()),
        measurements={"step, s": {"plain": [plain[2]], "fsdp2": [sharded[2]]}},
        ratios=[Ratio("step: FSDP2 / plain", [sharded[2] / plain[2]])],
    )
    if not (apart <= FURTHEST and max(errors.values()) <= 0.01):
        raise SystemExit(
            f"FSDP2 differs from one plain process: losses by {apart:.3g}, sharpness by {errors}"
        )
