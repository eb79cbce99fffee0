"""Run by test_sharpness_processes.py, alone and under torchrun: a loop of one's own, then transformers' Trainer."""

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from blockwise_lr.integrations.transformers import SharpnessCallback
from blockwise_lr.sharpness.monitor import SharpnessMonitor
from support import tiny_models
from support.process_group import end_process_group

ROWS, LENGTH, STEPS = 4, 12, 3
TOKENS = ROWS * (LENGTH - 1)
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def row(i):
    ids = torch.randint(40, (LENGTH,), generator=torch.Generator().manual_seed(i))
    return {"input_ids": ids, "labels": ids}


def batch(first, rows=ROWS):
    made = [row(first + i) for i in range(rows)]
    return {name: torch.stack([each[name] for each in made]) for name in made[0]}


gpt2 = partial(tiny_models.gpt2, n_positions=LENGTH, dropout=0.0, use_cache=False)


# Three windows: processes have unequal shares.
HELD_OUT = [batch(1000), batch(1010, rows=3)]


def own_loop(folder):
    model = gpt2()
    if WORLD > 1:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    each = {"every": 1, "path": folder / "loop.jsonl", "tokens_per_step": TOKENS}
    reader = SharpnessMonitor(model, estimator="empirical", **each)
    others = [
        SharpnessMonitor(model, HELD_OUT, **each),
        SharpnessMonitor(model, HELD_OUT, estimator="hutchinson", **each),
        SharpnessMonitor(model, estimator="optimizer", optimizer=optimizer, **each),
    ]
    for step in range(STEPS):
        for monitor in others:
            monitor.step(step)
        share = {name: rows.tensor_split(WORLD)[RANK] for name, rows in batch(ROWS * step).items()}
        model(**share).loss.backward()
        reader.gradients(step)
        optimizer.step()
        optimizer.zero_grad()
    for monitor in others:
        monitor.step(STEPS)


def trainer(folder):
    arguments = TrainingArguments(
        str(folder / "trainer"), max_steps=STEPS, per_device_train_batch_size=ROWS // WORLD, learning_rate=1e-3,
        max_grad_norm=0.1, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    running = Trainer(gpt2(), arguments, train_dataset=[row(i) for i in range(64)])
    estimators = ("fisher", "hutchinson", "empirical", "optimizer")
    running.add_callback(
        SharpnessCallback(
            HELD_OUT, every=1, estimators=estimators, tokens_per_step=TOKENS, log=running.log,
            path=folder / "trainer.jsonl",
        )
    )  # fmt: skip
    running.train()


if __name__ == "__main__":
    own_loop(Path(sys.argv[1]))
    trainer(Path(sys.argv[1]))
    end_process_group()
