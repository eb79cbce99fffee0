"""A training loop under fully_shard (FSDP2): groups by block, schedule, clipping by block, sharded checkpoints.

    torchrun --standalone --nproc-per-node=2 examples/cluster/fsdp2.py --out runs/fsdp2

One process a GPU, with nccl; without GPUs it runs on the CPU, with gloo. The same command goes on from the newest
checkpoint, with another number of processes too: --batch-size is the global one. SIGTERM ends the running step, saves
a checkpoint and exits with 143.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional

from blockwise_lr import clip_grad_norm_by_block, cosine_schedule, param_groups, split_fused
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.sources import open_source
from blockwise_lr.integrations.sharded import load_sharded, save_sharded

VOCABULARY = 256  # bytes


def main() -> None:
    arguments = parse()
    gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if arguments.batch_size % world:
        raise SystemExit(f"--batch-size is {arguments.batch_size}; expected a multiple of {world} processes")

    model = sharded(arguments, device)
    groups = param_groups(
        model, arguments.lr, weight_decay=0.1
    )  # after fully_shard, which makes new parameters
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.95), fused=gpus)
    schedule = cosine_schedule(optimizer, warmup_steps=arguments.steps // 10, total_steps=arguments.steps)
    first = 0
    if newest := newest_checkpoint(arguments.out):
        load_sharded(newest, model, optimizer, schedule)
        first = int(newest.name.removeprefix("checkpoint-"))

    terminated: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: terminated.append(number))
    text = torch.frombuffer(bytearray(words(arguments.data).encode()), dtype=torch.uint8)
    for step in range(first + 1, arguments.steps + 1):
        ids = batch(text, step, arguments)[rank::world].to(device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        clip_grad_norm_by_block(model, 1.0, blocks=optimizer.param_groups)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % arguments.log_every == 0:
            mean = loss.detach() / world
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step}: loss {mean.item():.4f}", flush=True)
        # On the CPU, so that nobody waits for a GPU. All processes have to stop after the same step.
        stop = torch.tensor(len(terminated))
        dist.all_reduce(stop)
        if stop or step == arguments.steps or step % arguments.save_every == 0:
            save_sharded(arguments.out / f"checkpoint-{step}", model, optimizer, schedule)
        if stop and step < arguments.steps:
            if rank == 0:
                print(f"SIGTERM: saved step {step}; the same command goes on from there", flush=True)
            sys.exit(143)
    dist.barrier()  # one that is gone while another still listens aborts that one
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that all processes see")
    parser.add_argument("--data", type=Path, help="a text file (default: the embedded text)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--batch-size", type=int, default=8, help="sequences a step, of all processes together"
    )
    parser.add_argument("--lr", type=float, default=3e-4, help="base learning rate")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--save-every", type=int, default=20)
    return parser.parse_args()


def sharded(arguments: argparse.Namespace, device: torch.device) -> Any:
    """The model, its weights the same on any number of processes; each builds all of it before it keeps a shard."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=arguments.context,
        n_embd=arguments.width,
        n_layer=arguments.layers,
        n_head=max(1, arguments.width // 64),
        bos_token_id=None,
        eos_token_id=None,
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    torch.manual_seed(0)
    model = split_fused(GPT2LMHeadModel(config)).to(device)  # before fully_shard
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mp_policy": half} if device.type == "cuda" else {}
    for layer in model.transformer.h:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def words(data: Path | None) -> str:
    return data.read_text(encoding="utf-8") if data else "\n".join(open_source(DataConfig()).documents())


def batch(text: torch.Tensor, step: int, arguments: argparse.Namespace) -> torch.Tensor:
    """The whole batch of a step, which depends on nothing but its number."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - arguments.context, (arguments.batch_size,), generator=generator)
    return torch.stack([text[start : start + arguments.context] for start in starts.tolist()]).long()


def newest_checkpoint(out: Path) -> Path | None:
    """Whole ones only: until it is whole, a checkpoint's name begins with a dot."""
    found = out.glob("checkpoint-*")
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


if __name__ == "__main__":
    main()
