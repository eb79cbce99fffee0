"""Do blockwise learning rates help models other than the dense Transformer, and with which ratios?

    python studies/2026-11-architectures/run.py --text TEXT.jsonl[.xz] --out runs/architectures
    python studies/2026-11-architectures/run.py --list

One process trains one arm after another on one thread, in the order of plan.py, and writes each result to data/runs.
Start as many as there are cores. A run that is cut off goes on from its last checkpoint. TEXT: one {"text": ...} a
line, the text of the horizon study. Copy the dense LLaMA's runs from that study: equal runs have equal names. The rule
`own` needs measure.py, after the uniform runs; then run this again.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "_support"))

import models  # adds its shapes
import text_runs
from plan import DENSE, queue

RESULTS = Path(__file__).parent / "data" / "runs"
SECONDS_A_STEP = {"qwen3-next": 0.39}  # of a core of an AMD EPYC; the other models take 0.22 to 0.26

if __name__ == "__main__":
    text_runs.main(
        __doc__,
        queue,
        [*models.NAMES, DENSE],
        results=RESULTS,
        out=Path("runs/architectures"),
        minutes=lambda arm: arm.steps * SECONDS_A_STEP.get(arm.shape, 0.26) / 60,
    )
