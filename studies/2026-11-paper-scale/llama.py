"""One LLaMA on one device, trained several times from the same initial weights."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockwise_lr import (
    Block,
    classify,
    cosine_schedule,
    measure_directional,
    measure_sharpness,
    param_groups,
    split_fused,
)
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig

ROWS = 64
MEASURED_AT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0)
"""When sharpness is measured, in parts of the run; also at its start."""


class Llama:
    """A model, its text, and what it takes to train it again and again.

    The compiled model stays and its weights are loaded again for each run: compiling takes longer than a short run.

    Args:
        shape: of the model.
        data: folder with train.bin and val.bin, uint16 tokens. The first half of val.bin is "tune", which chooses
            between runs; the second half is "val", which is reported.
        device: "cuda" or "cpu".
        compiled: use torch.compile.
        measured_rows: windows in one batch of a measurement.

    Raises:
        SystemExit: a file of tokens is too short, or holds tokens outside the vocabulary.
    """

    def __init__(
        self, shape: ModelConfig, data: Path, *, device: str, compiled: bool, measured_rows: int = 8
    ) -> None:
        self.model = split_fused(build_model(shape, seed=0)).to(device)
        self.start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.blocks = classify(self.model)
        self.forward: Any = torch.compile(self.model) if compiled else self.model
        self.context, self.vocab_size = shape.context, shape.vocab_size
        self.device, self.measured_rows = torch.device(device), measured_rows
        self.train = self._windows(data / "train.bin")
        val = self._windows(data / "val.bin")
        self.tune, self.val = val[: len(val) // 2], val[len(val) // 2 :]
        self.order = np.random.default_rng(0).permutation(len(self.train))

    def run(
        self,
        ratios: Mapping[Block, float],
        base_lr: float,
        *,
        warmup: float,
        steps: int,
        measure: bool = False,
        curve_points: int = 20,
    ) -> dict[str, Any]:
        """Train from the initial weights.

        Args:
            ratios: of each block's learning rate to the base rate.
            base_lr: the base learning rate.
            warmup: part of the run in which the rates rise.
            steps: number of steps, of ROWS windows each.
            measure: measure sharpness, and directional reports, along the run.
            curve_points: how often to evaluate on 8 batches of "val" along the run.

        Returns:
            "tune", "val" and "val_8" (the loss on 8 batches), "curve": [step, val_8] along the run, "train": the loss
            of every tenth step; a loss that is not finite is None. "seconds" and "tokens_per_second", without
            evaluations and measurements. With `measure` also "sharpness" and "directional".
        """
        self.model.load_state_dict(self.start)
        self.model.train()
        groups = param_groups(self.model, base_lr, ratios, weight_decay=0.1, blocks=self.blocks)
        fused = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(groups, lr=base_lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)
        schedule = cosine_schedule(
            optimizer, warmup_steps=max(1, int(warmup * steps)), total_steps=steps, floor=base_lr / 20
        )
        every = max(1, steps // curve_points) if curve_points else steps
        points = {max(1, round(part * steps)) for part in MEASURED_AT} if measure else set()
        sharpness = [self._sharpness(0)] if measure else []
        curve, losses, directional = [], [], []
        began, aside = time.monotonic(), 0.0
        for step in range(1, steps + 1):
            loss = self.step(optimizer, step - 1)
            schedule.step()
            if step % 10 == 1:
                losses.append(loss)
            paused = time.monotonic()
            if step in points:
                sharpness.append(self._sharpness(step))
                if step < steps:
                    batches = self._held_out(4)
                    report = measure_directional(
                        self.model, optimizer, batches, blocks=self.blocks, step=step
                    )
                    directional.append(report.to_dict())
            if step % every == 0 and step < steps:
                curve.append([step, self.evaluate(self.val, 8)])
            aside += time.monotonic() - paused
        train = [_rounded(value) for value in torch.stack(losses).tolist()]  # waits for the device
        seconds = time.monotonic() - began - aside
        found = {
            "tune": self.evaluate(self.tune, 16),
            "val": self.evaluate(self.val, 64),
            "val_8": self.evaluate(self.val, 8),
            "curve": curve,
            "train": train,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(steps * ROWS * self.context / seconds),
        }
        return found | ({"sharpness": sharpness, "directional": directional} if measure else {})

    def step(self, optimizer: torch.optim.Optimizer, index: int) -> torch.Tensor:
        """Make one step on the windows number `index` times ROWS and following; return the loss, on the device."""
        rows = self.order[np.arange(index * ROWS, (index + 1) * ROWS) % len(self.order)]
        loss: torch.Tensor = self._loss(self.train[torch.from_numpy(rows).to(self.device)])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, windows: torch.Tensor, batches: int) -> float | None:
        """Return the mean loss of the first batches of the windows; None if it is not finite."""
        self.model.eval()
        batches = min(batches, len(windows) // ROWS)
        losses = [self._loss(windows[i * ROWS : (i + 1) * ROWS]).float() for i in range(batches)]
        self.model.train()
        return _rounded(float(torch.stack(losses).mean()))

    def _loss(self, rows: torch.Tensor) -> Any:
        """Return the loss on some windows, on a GPU under bf16 autocast."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            ids = rows.long()
            return self.forward(input_ids=ids, labels=ids).loss

    def _sharpness(self, step: int) -> dict[str, Any]:
        batches = self._held_out(8, after=4)
        report = measure_sharpness(self.model, batches, blocks=self.blocks, step=step, seed=step)
        return {"step": step, **{block.value: [one.mean, one.stderr] for block, one in report.items()}}

    def _held_out(self, batches: int, after: int = 0) -> list[dict[str, torch.Tensor]]:
        """Return batches from the end of "tune"; `after` so many others, counted from the end."""
        size = self.measured_rows
        end = len(self.tune) - after * size
        windows = self.tune[end - batches * size : end].long()
        return [{"input_ids": rows, "labels": rows} for rows in windows.split(size)]

    def _windows(self, path: Path) -> torch.Tensor:
        tokens = np.fromfile(path, np.uint16).astype(np.int32)
        count = len(tokens) // self.context
        if count < 2 * ROWS:
            raise SystemExit(
                f"{path} has {count} windows of {self.context} tokens; expected {2 * ROWS} or more"
            )
        if tokens.max() >= self.vocab_size:
            raise SystemExit(
                f"{path} holds the token {tokens.max()}; expected uint16 tokens below {self.vocab_size}, "
                "the model's vocabulary"
            )
        return torch.from_numpy(tokens[: count * self.context]).view(count, self.context).to(self.device)


def _rounded(loss: float) -> float | None:
    return round(loss, 5) if math.isfinite(loss) else None
