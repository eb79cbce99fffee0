"""How much do blockwise learning rates win over longer and longer runs, and with which ratios?

    python studies/2026-11-horizon/run.py --text TEXT.jsonl[.xz] --out runs/horizon
    python studies/2026-11-horizon/run.py --list

One process trains one arm after another on one thread, in the order of plan.py, and writes each result to data/runs.
Start as many as there are cores. A run that is cut off goes on from its last checkpoint. TEXT: one {"text": ...} a
line, 40 million tokens for the longest runs. On a GPU, --stack K trains up to K arms of one shape and length at once.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "_support"))

import text_runs
from plan import queue
from shapes import LLAMAS

RESULTS = Path(__file__).parent / "data" / "runs"

if __name__ == "__main__":
    text_runs.main(__doc__, queue, list(LLAMAS), results=RESULTS, out=Path("runs/horizon"))
