"""Losses of GPT-2 small in bf16, compiled, with fused AdamW and split QKV against fp32 without any of them."""

from __future__ import annotations

import copy

import numpy as np
import torch
from _measure import GPT2_SMALL, GPT2_TINY

from blockwise_lr import param_groups, split_fused
from blockwise_lr.fp32 import fp32_precision
from blockwise_lr.train.build_model import build_model
from gpu.run_parts import Task

FURTHEST = {"half": 0.05, "all": 0.05, "split": 1e-3, "fused": 1e-3}
"""Largest difference from fp32's losses, in nats."""


@fp32_precision("ieee")
def measure(task: Task) -> None:
    """Train from the same weights in every way. Only the last way compiles; the file is written after each.

    Raises:
        SystemExit: losses differ, or the reference does not learn.
    """
    text = torch.from_numpy(np.fromfile(task.data / "train.bin", np.uint16).astype(np.int64))
    shape = GPT2_TINY if task.tiny else GPT2_SMALL
    steps, rows, length, lr = (6, 2, 32, 1e-2) if task.tiny else (20, 8, 512, 3e-4)
    batches = text[: steps * rows * length].view(steps, rows, length).to(task.device)
    start = build_model(shape, seed=0).to(task.device).eval()  # no dropout

    def losses(*ways: str) -> list[float]:
        model = copy.deepcopy(start)
        if "split" in ways:
            split_fused(model)
        # The tiny form traces the graph and leaves out the code generation.
        forward = torch.compile(model, backend="eager" if task.tiny else "inductor")
        optimizer = torch.optim.AdamW(param_groups(model, lr, {}), lr=lr, fused="fused" in ways)
        found = []
        for ids in batches:
            with torch.autocast(task.device, torch.bfloat16, enabled="half" in ways):
                loss = (forward if "compiled" in ways else model)(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return torch.stack(found).tolist()

    reference = losses()
    found: dict[str, list[float]] = {}
    apart: dict[str, float] = {}
    task.record.add(settings={"shape": vars(shape), "steps": steps, "lr": lr}, reference=reference)
    for name in ("split", "fused", "half", "all"):
        ways = ("split", "fused", "half", "compiled") if name == "all" else (name,)
        found[name] = losses(*ways)
        apart[name] = max(abs(a - b) for a, b in zip(found[name], reference))
        task.record.add(losses=found, largest_difference=apart)
    wrong = {name: off for name, off in apart.items() if not off <= FURTHEST[name]}
    if wrong or not reference[-1] < reference[0]:
        raise SystemExit(
            f"not equal to fp32: {wrong}; fp32's losses {reference[0]:.3f} .. {reference[-1]:.3f}"
        )
