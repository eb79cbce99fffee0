"""Does a faster route end in as good a model? Train the models that are compared, and keep their weights.

    python studies/2026-11-downstream/run.py --text TEXT.jsonl[.xz] --out runs/downstream
    python studies/2026-11-downstream/run.py --list

One process trains one arm after another on one thread, in the order of plan.py. Results go to data/runs, weights to
OUT/weights. Start as many as there are cores. A run that is cut off goes on from its last checkpoint. A rule is trained
once the horizon study has tuned it at 1 200 steps: the settings come from that study's data/runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1] / "_support"))

import text_runs
from arms import Arm
from plan import COMPARED, HORIZON, SHAPE, chosen, queue
from stacked import Stack, Text

RESULTS = Path(__file__).parent / "data" / "runs"
OUT = Path("runs/downstream")
STEPS_A_MINUTE = 300  # of one core of an AMD EPYC


def weights_of(arm: Arm, out: Path) -> Path:
    """Return the file of the weights that a run ended with."""
    return out / "weights" / f"{arm.name}.safetensors"


def train(arms: list[Arm], text: Text, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train with AdamW, from the last checkpoint if there is one, and write the weights."""
    checkpoint = arguments.out / f"{'-'.join(sorted(arm.name for arm in arms))[:200]}.pt"
    stack = Stack(arms, text, device=arguments.device)
    results = stack.run(checkpoint=checkpoint)
    for number, arm in enumerate(arms):
        path = weights_of(arm, arguments.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {name: weight[number].contiguous().cpu() for name, weight in stack.weights.items()}
        save_file(values, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return results


def main() -> None:
    text_runs.main(
        __doc__,
        queue,
        [SHAPE],
        results=RESULTS,
        out=OUT,
        trainer=train,
        minutes=lambda arm: arm.steps / STEPS_A_MINUTE,
    )
    tuning_runs = text_runs.load(HORIZON / "data" / "runs")
    if missing := [rule for rule in COMPARED if chosen(rule, tuning_runs) is None]:
        print(f"The horizon study has not tuned {', '.join(missing)} at 1 200 steps: train its queue first.")


if __name__ == "__main__":
    main()
