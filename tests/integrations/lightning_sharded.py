"""Run by test_lightning_processes.py, alone and in two processes: Lightning with fully_shard."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from blockwise_lr.integrations.lightning import BlockMonitor, configure_optimizers_by_block
from support import tiny_models
from support.process_group import end_process_group

ROWS, LENGTH, STEPS = 4, 12, 3
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def row(i):
    ids = torch.randint(40, (LENGTH,), generator=torch.Generator().manual_seed(i))
    return {"input_ids": ids, "labels": ids}


class LanguageModel(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = tiny_models.gpt2(split=True, use_cache=False, dropout=0.0)

    def configure_model(self):
        if WORLD > 1:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.transformer.h:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return configure_optimizers_by_block(self, 1e-3, "measured", warmup_steps=1)


def run(folder):
    held_out = {
        name: torch.stack([row(1000 + i)[name] for i in range(2)]) for name in ("input_ids", "labels")
    }
    monitor = BlockMonitor([held_out], every=1, path=folder / "sharpness.jsonl")
    trainer = Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=ModelParallelStrategy(WORLD, 1) if WORLD > 1 else "auto",
        use_distributed_sampler=False,
        max_steps=STEPS,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger(folder, version=0),
        callbacks=[monitor],
    )
    module = LanguageModel()
    each = [row(i) for i in range(RANK, STEPS * ROWS, WORLD)]
    trainer.fit(module, DataLoader(each, batch_size=ROWS // WORLD))
    assert all(isinstance(p, DTensor) for p in module.parameters()) == (WORLD > 1)
    whole = {n: p.full_tensor() if WORLD > 1 else p for n, p in module.model.named_parameters()}
    if RANK == 0:
        torch.save({name: value.detach() for name, value in whole.items()}, folder / "sharded.pt")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    end_process_group()
