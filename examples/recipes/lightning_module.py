"""Lightning: configure_optimizers in two lines, and a callback that logs rates, ratios and sharpness by block."""

import csv
import tempfile
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from blockwise_lr import split_fused
from blockwise_lr.integrations.lightning import BlockMonitor, configure_optimizers_by_block

STEPS, BASE_LR = 60, 1e-3


class LanguageModel(lightning.LightningModule):
    """A GPT-2 with a learning rate per block."""

    def __init__(self) -> None:
        super().__init__()
        self.model = split_fused(
            GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=2, n_head=2))
        )

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        loss = self.model(input_ids=batch[0], labels=batch[0]).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        return configure_optimizers_by_block(self, lr=BASE_LR, warmup_steps=6, betas=(0.9, 0.95))


lightning.seed_everything(0, verbose=False)
tokens = torch.arange(32).repeat(512, 1) + torch.randint(96, (512, 1))  # sequences that count upwards
held_out = [{"input_ids": rows, "labels": rows} for rows in tokens[480:].split(16)]
folder = tempfile.mkdtemp()
trainer = lightning.Trainer(
    max_steps=STEPS,
    accelerator="cpu",
    gradient_clip_val=1.0,
    logger=CSVLogger(folder),
    callbacks=[BlockMonitor(held_out, every=30), LearningRateMonitor()],
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    log_every_n_steps=20,
)
trainer.fit(LanguageModel(), DataLoader(TensorDataset(tokens[:480]), batch_size=8, shuffle=True))

with next(Path(folder).rglob("metrics.csv")).open(encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file))
for name in ("lr-AdamW/qk", "lr/qk", "ratio/qk", "sharpness/fisher/qk", "sharpness/fisher/norm", "loss"):
    print(
        f"{name:22}",
        *(f"step {row['step']}: {float(row[name]):.2g}" for row in rows if row.get(name)),
        sep="  ",
    )
    assert name in rows[0]
ratios = {group["name"]: group["lr_ratio"] for group in trainer.optimizers[0].param_groups}
print("ratios:", ratios)
assert ratios["emb"] > ratios["vo"]
losses = [float(row["loss"]) for row in rows if row["loss"]]
assert losses[-1] < losses[0] / 2
