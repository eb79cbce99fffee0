"""Train LLaMA-134M with the ratios, rates and warm-ups given, one run after the other, in one process.

python studies/2026-11-paper-scale/train.py --data TOKENS --out FILE.json \
    --runs uniform:1.2e-3:0.2:1000 measured:4.2e-4:0.15:1000

TOKENS is a folder with train.bin and val.bin: uint16 tokens of GPT-2, as nanoGPT writes them. A run is
RATIOS:BASE_LR:WARM_UP:STEPS. The first half of val.bin chooses rates, the second half is reported.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockwise_lr import classify, cosine_schedule, param_groups, split_fused
from blockwise_lr.optim.ratios import resolve_ratios
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.presets import get_preset

ROWS = 64


def main() -> None:
    """Train every run and write the results after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", required=True, metavar="RATIOS:BASE_LR:WARM_UP:STEPS")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="width 32, 512 tokens, uncompiled: to try the script"
    )
    options = parser.parse_args()
    shape = get_preset("llama-134m-minipile").model
    if options.tiny:
        shape = replace(shape, hidden_size=32, layers=1, heads=2, vocab_size=512, context=16)
    model = split_fused(build_model(shape, seed=0)).to(options.device)
    trainer = Trainer(model, options.data, shape.context, compiled=not options.tiny)
    log: dict[str, Any] = {"shape": asdict(shape), "torch": torch.__version__, "runs": []}
    for text in options.runs:
        ratios, base_lr, warmup, steps = text.split(":")
        log["runs"].append(trainer.run(ratios, float(base_lr), float(warmup), int(steps)))
        options.out.write_text(json.dumps(log, indent=1))
        print(log["runs"][-1], flush=True)


class Trainer:
    """One model that is trained several times from the same initial weights."""

    def __init__(self, model: torch.nn.Module, data: Path, context: int, *, compiled: bool) -> None:
        self.model, self.context = model, context
        self.device = next(model.parameters()).device
        self.start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.blocks = classify(model)
        self.forward: Any = torch.compile(model) if compiled else model
        self.train = self._windows(data / "train.bin")
        val = self._windows(data / "val.bin")
        self.tune, self.val = val[: len(val) // 2], val[len(val) // 2 :]
        self.order = np.random.default_rng(0).permutation(len(self.train))

    def _windows(self, path: Path) -> torch.Tensor:
        tokens = np.fromfile(path, np.uint16).astype(np.int32)
        count = len(tokens) // self.context
        return torch.from_numpy(tokens[: count * self.context]).view(count, self.context).to(self.device)

    def loss(self, rows: torch.Tensor) -> Any:
        """Return the loss on some windows under bf16 autocast."""
        with torch.autocast(self.device.type, torch.bfloat16):
            ids = rows.long()
            return self.forward(input_ids=ids, labels=ids).loss

    @torch.no_grad()
    def evaluate(self, windows: torch.Tensor, batches: int) -> float:
        """Return the mean loss of the first batches of the windows."""
        self.model.eval()
        batches = min(batches, len(windows) // ROWS)
        total = sum(float(self.loss(windows[i * ROWS : (i + 1) * ROWS])) for i in range(batches))
        self.model.train()
        return total / batches

    def run(self, ratios: str, base_lr: float, warmup: float, steps: int) -> dict[str, Any]:
        """Train from the initial weights and return settings and losses."""
        self.model.load_state_dict(self.start)
        groups = param_groups(self.model, base_lr, ratios, weight_decay=0.1, blocks=self.blocks)
        fused = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(groups, lr=base_lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)
        schedule = cosine_schedule(
            optimizer, warmup_steps=max(1, int(warmup * steps)), total_steps=steps, floor=base_lr / 20
        )
        curve = []
        for step in range(steps):
            index = self.order[np.arange(step * ROWS, (step + 1) * ROWS) % len(self.order)]
            self.loss(self.train[torch.from_numpy(index).to(self.device)]).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if (step + 1) % max(1, steps // 20) == 0 and step + 1 < steps:
                curve.append([step + 1, self.evaluate(self.val, 8)])
        return {
            "arm": ratios,
            "ratios": {block.value: ratio for block, ratio in resolve_ratios(ratios).items()},
            "base_lr": base_lr,
            "steps": steps,
            "warmup": warmup,
            "tune": self.evaluate(self.tune, 16),
            "val": self.evaluate(self.val, 64),
            "val_8": self.evaluate(self.val, 8),
            "curve": curve,
        }


if __name__ == "__main__":
    main()
