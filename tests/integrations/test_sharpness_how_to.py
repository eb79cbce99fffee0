"""What docs/how-to/sharpness.md shows is what happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "sharpness.md"
BLOCKS = re.findall(
    r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
)


@pytest.mark.parametrize(
    ("code", "leaves"), list(zip(BLOCKS, ("out/sharpness.jsonl", "evolution.png"), strict=True))
)
def test_every_code_block_runs(code, leaves, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / leaves).stat().st_size > 1000
