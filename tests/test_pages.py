"""What the pages of docs/ show is what happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
# Of each page whose code stands alone: the file that each block of code leaves, if any.
LEAVES = {
    "how-to/sharpness.md": (None, "out/sharpness.jsonl", "evolution.png"),
    "how-to/optimizers.md": (None, None, None, None),
    "how-to/sharded.md": ("run/checkpoint-2/__0_0.distcp",),
    "concepts/ratios.md": (None,),
    "concepts/learning-rates.md": (None, None, None),
    "getting-started.md": (None,),
}


def blocks_of(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


CASES = [
    pytest.param(code, leaves, id=f"{page}-{i}")
    for page, files in LEAVES.items()
    for i, (code, leaves) in enumerate(zip(blocks_of(page), files, strict=True))
]


@pytest.mark.parametrize(("code", "leaves"), CASES)
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
    if leaves is None:
        assert done.stdout
    else:
        assert (tmp_path / leaves).stat().st_size > 1000
