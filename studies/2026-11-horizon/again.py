"""Train the tuned arms of 4 800 steps at seed 0 again, to see when they learn to copy: their runs are older than that.

    python studies/2026-11-horizon/again.py --text TEXT.jsonl[.xz] --out runs/horizon-again

The results in data/again replace no run. They also show how much rounding alone changes such a run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "_support"))

import text_runs
from arms import Arm
from copying_gains import SHAPE, STEPS
from rules import settled
from run import RESULTS
from shapes import LLAMAS
from tuning import Results, waiting

AGAIN = Path(__file__).parent / "data" / "again"


def queue(results: Results, shapes: Sequence[str] = ()) -> list[Arm]:
    """Return the arms that have not been trained again."""
    tuned = [settled(SHAPE, STEPS, rule, text_runs.load(RESULTS)) for rule in ("uniform", "half")]
    return waiting([arm for arm in tuned if arm is not None], results, shapes)


if __name__ == "__main__":
    text_runs.main(__doc__, queue, list(LLAMAS), results=AGAIN, out=Path("runs/horizon-again"))
