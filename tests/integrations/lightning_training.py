"""Run by test_lightning_processes.py, alone and in two processes: Lightning with DDP, cut and resumed."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from blockwise_lr.integrations.lightning import BlockMonitor, configure_optimizers_by_block
from support import tiny_models
from support.process_group import end_process_group

ROWS, LENGTH, STEPS = 4, 12, 4
TOKENS = 2 * ROWS * (LENGTH - 1)  # two micro-batches
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def row(i):
    ids = torch.randint(40, (LENGTH,), generator=torch.Generator().manual_seed(i))
    return {"input_ids": ids, "labels": ids}


def rows(first=0):
    """Batches from a given one on; those of all processes together are the same on any number of them."""
    each = [row(i) for i in range(first * ROWS + RANK, 12 * ROWS, WORLD)]
    return DataLoader(each, batch_size=ROWS // WORLD)


class LanguageModel(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = tiny_models.gpt2(split=True, use_cache=False, dropout=0.0)

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return configure_optimizers_by_block(self, 1e-3, "measured", warmup_steps=1)


def fit(folder, data, resume=None):
    # Those of the first process count; three rows are unequal shares.
    held_out = [row(1000 + i if RANK == 0 else 0) for i in range(3)]
    batches = [{name: torch.stack([each[name] for each in held_out]) for name in ("input_ids", "labels")}] * 2
    estimators = ("fisher", "hutchinson", "empirical", "optimizer")
    monitor = BlockMonitor(
        batches, every=1, estimators=estimators, tokens_per_step=TOKENS, path=folder / "sharpness.jsonl"
    )
    saving = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy="ddp" if WORLD > 1 else "auto",
        use_distributed_sampler=False,
        max_steps=STEPS,
        accumulate_grad_batches=2,
        gradient_clip_val=0.1,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger(folder, version=0 if resume is None else 1),
        callbacks=[monitor, LearningRateMonitor(), saving],
    )
    module = LanguageModel()
    trainer.fit(module, data, ckpt_path=resume)
    return module


def run(folder):
    whole = fit(folder / "whole", rows())
    if RANK == 0:
        torch.save(whole.model.state_dict(), folder / "whole.pt")
    # Two optimizer steps took four batches, and a DataLoader does not remember them.
    resumed = fit(folder / "whole", rows(4), resume=folder / "whole" / "step=2.ckpt")
    if RANK == 0:
        torch.save(resumed.model.state_dict(), folder / "resumed.pt")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    end_process_group()
