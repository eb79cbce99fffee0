"""What the README and the examples show is what happens."""

import re
from pathlib import Path

import pytest

from support.processes import run_python

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_every_code_block_of_the_readme_runs(code, tmp_path):
    done = run_python("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_readme_shows_code():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_every_example_runs(example, tmp_path):
    done = run_python(example, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def is_written(page: Path) -> bool:
    """Whether a page of a study exists; the template of a study that has not run yet has none."""
    return page.with_name(page.name.replace(".template", "")).exists()


@pytest.mark.parametrize(
    "page",
    [
        *(
            ROOT / name
            for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "studies/README.md")
        ),
        *sorted((ROOT / "docs").rglob("*.md")),
        *(page for page in sorted((ROOT / "studies").glob("*/*.md")) if is_written(page)),
    ],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_every_link_between_pages_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text) + re.findall(
        r'src="(?!https?:)([^"]+)"', text
    )
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
