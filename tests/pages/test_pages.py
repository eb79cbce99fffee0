"""What the pages of docs/ show is what happens."""

import re
from pathlib import Path

import pytest

from support.processes import run_python

DOCS = Path(__file__).parents[2] / "docs"
# Of each page whose code stands alone: the file that each block of code leaves, if any.
LEAVES = {
    "how-to/sharpness.md": (None, "out/sharpness.jsonl", "evolution.png"),
    "how-to/choose-ratios-and-learning-rate.md": (None,),
    "how-to/initial-scale.md": (None,),
    "how-to/optimizers.md": (None,),
    "how-to/muon.md": (None,),
    "how-to/adam-mini.md": (None,),
    "how-to/auto-ratios.md": (None,),
    "how-to/schedules.md": (None,),
    "how-to/clipping.md": (None,),
    "how-to/resume.md": (None, None),
    "how-to/sharded.md": ("run/checkpoint-2/__0_0.distcp",),
    "recipes/export.md": (None,),
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
    done = run_python("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    if leaves is None:
        assert done.stdout
    else:
        assert (tmp_path / leaves).stat().st_size > 1000
