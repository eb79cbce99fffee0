"""Padded sequences of many lengths under BlockwiseTrainer with AutoRatios; also run by torchrun.

The loss that the guard watches is held to the loss of the whole step, computed here from the logits.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import TrainingArguments

from blockwise_lr import AutoRule
from blockwise_lr.integrations.transformers import BlockwiseTrainer
from support import tiny_models

STEPS, LONGEST = 6, 24


class Padded(Dataset):
    """Sequences of 2 to 24 tokens, padded to 24."""

    def __len__(self):
        return 512

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        # Long ones are in the minority, so that a micro-batch may hold nearly all tokens of a step, or few.
        length = LONGEST if i % 5 == 0 else int(torch.randint(2, 6, (), generator=generator))
        ids = torch.zeros(LONGEST, dtype=torch.long)
        ids[:length] = torch.randint(3, 40, (length,), generator=generator)
        kept = torch.arange(LONGEST) < length
        return {"input_ids": ids, "attention_mask": kept.long(), "labels": torch.where(kept, ids, -100)}


llama = partial(tiny_models.llama, max_position_embeddings=LONGEST)


def mean_over_tokens(outputs, labels, num_items_in_batch=None):
    """A ``compute_loss_func``, as transformers describes it."""
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    total = functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


class Guarded(BlockwiseTrainer):
    """Keeps what the guard watches, and the true loss of each step."""

    by_tokens = True
    smoothing = 0.0

    def create_scheduler(self, *args, **kwargs):
        scheduler = super().create_scheduler(*args, **kwargs)
        self.watched, self.true, self._shares = [], [], []
        watch = self.auto.watch
        self.auto.watch = lambda loss: self.watched.append(loss) or watch(loss)
        return scheduler

    def training_step(self, model, inputs, *args, **kwargs):
        with torch.no_grad():
            labels = inputs["labels"][:, 1:].flatten()
            logits = self.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
            total = functional.cross_entropy(
                logits.flatten(0, 1), labels, reduction="sum", label_smoothing=self.smoothing
            )
        self._shares.append(torch.stack([total, (labels != -100).sum().float()]))
        if self.accelerator.sync_gradients:
            self.true.append(self._of_step())
        return super().training_step(model, inputs, *args, **kwargs)

    def _of_step(self):
        shares, self._shares = torch.stack(self._shares), []
        if not self.by_tokens:
            loss = (shares[:, 0] / shares[:, 1]).mean()
        elif self.args.average_tokens_across_devices:
            totals = shares.sum(0)
            if dist.is_initialized():
                dist.all_reduce(totals)
            return float(totals[0] / totals[1])
        else:
            loss = shares[:, 0].sum() / shares[:, 1].sum()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        return float(loss)


def trained(folder, *, by_tokens=True, steps=STEPS, rule=None, own_loss=False, base=Guarded, **changes):
    settings = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
        "gradient_accumulation_steps": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "warmup_steps": 1, **changes,
    }  # fmt: skip
    trainer = base(
        llama(),
        TrainingArguments(**settings),
        train_dataset=Padded(),
        ratios=rule or AutoRule(start=0.0),
        compute_loss_func=mean_over_tokens if own_loss else None,
    )
    trainer.by_tokens, trainer.smoothing = by_tokens, settings.get("label_smoothing_factor", 0.0)
    trainer.model_accepts_loss_kwargs = by_tokens and not own_loss
    trainer.train()
    return trainer


if __name__ == "__main__":
    found = {}
    for across in (True, False):
        one = trained(Path(sys.argv[1]) / "out", average_tokens_across_devices=across)
        logged = [row["loss"] for row in one.state.log_history if "loss" in row]
        found[f"across {across}"] = [one.watched, one.true, logged]
    if dist.get_rank() == 0:
        (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()
