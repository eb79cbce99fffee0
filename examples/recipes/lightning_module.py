"""Lightning: configure_optimizers returns an optimizer on groups by block, and a schedule for every step."""

import tempfile
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from blockwise_lr import cosine_schedule, param_groups, split_fused

STEPS, BASE_LR = 60, 1e-3


class LanguageModel(lightning.LightningModule):
    """A GPT-2 with a learning rate per block."""

    def __init__(self) -> None:
        super().__init__()
        self.model = split_fused(
            GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=2, n_head=2))
        )
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        loss = self.model(input_ids=batch[0], labels=batch[0]).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        groups = param_groups(self.model, lr=BASE_LR, weight_decay=0.1)
        for group in groups:
            group["name"] = group["block"]  # what LearningRateMonitor calls it
        optimizer = torch.optim.AdamW(groups, lr=BASE_LR, betas=(0.9, 0.95))
        schedule = cosine_schedule(optimizer, warmup_steps=6, total_steps=STEPS, floor=BASE_LR / 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


lightning.seed_everything(0, verbose=False)
tokens = torch.arange(32).repeat(512, 1) + torch.randint(96, (512, 1))  # sequences that count upwards
module = LanguageModel()
folder = tempfile.mkdtemp()
trainer = lightning.Trainer(
    max_steps=STEPS,
    accelerator="cpu",
    gradient_clip_val=1.0,
    logger=CSVLogger(folder),
    callbacks=[LearningRateMonitor("step")],
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    log_every_n_steps=20,
)
trainer.fit(module, DataLoader(TensorDataset(tokens), batch_size=8, shuffle=True))

for group in trainer.optimizers[0].param_groups:
    print(f"{group['block']:>4}  ratio {group['lr_ratio']:g}  learning rate {group['lr']:.1e}")
columns = next(Path(folder).rglob("metrics.csv")).read_text(encoding="utf-8").splitlines()[0]
print("logged:", columns)
assert "lr-AdamW/qk" in columns
print(f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}")
assert module.losses[-1] < module.losses[0] - 1
