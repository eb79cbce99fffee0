"""Do blockwise learning rates help Muon with AdamW, whose two halves are tuned already?

    python studies/2026-11-muon/run.py --text TEXT.jsonl[.xz] --out runs/muon
    python studies/2026-11-muon/run.py --list

One process trains one arm after another on one thread, in the order of plan.py, and writes each result to data/runs.
Start as many as there are cores. A run that is cut off is made again. TEXT: one {"text": ...} a line, the text of the
horizon study.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "_support"))

import text_runs
from plain import train_plain
from plan import SHAPE, MuonArm, queue
from stacked import Text
from torch.optim import Optimizer
from transformers import PreTrainedModel

from blockwise_lr import param_groups
from blockwise_lr.optimizers.muon import Muon

RESULTS = Path(__file__).parent / "data" / "runs"
SECONDS_A_STEP = 0.36  # of a core of an AMD EPYC


def muon(arm: MuonArm, model: PreTrainedModel) -> Optimizer:
    """Return the library's Muon with the arm's ratios and momentum."""
    groups = param_groups(
        model, lr=arm.base_lr, ratios=arm.ratios or "uniform", weight_decay=arm.weight_decay
    )
    return Muon(
        groups,
        lr=arm.base_lr,
        betas=(0.9, arm.beta2),
        weight_decay=arm.weight_decay,
        momentum=arm.momentum,
    )


def train(arms: list[MuonArm], text: Text, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train arms one after another."""
    return [train_plain(arm, text, muon) for arm in arms]


if __name__ == "__main__":
    text_runs.main(
        __doc__,
        queue,
        [SHAPE],
        results=RESULTS,
        out=Path("runs/muon"),
        trainer=train,
        minutes=lambda arm: arm.steps * SECONDS_A_STEP / 60,
    )
