"""The commands and the code of the recipes for other trainers run, and the table of targets is complete."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import pytest

from blockwise_lr.export import REFUSED, TARGETS
from support.commands import call
from support.vision import import_timm, is_there

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "recipes"
PROGRAMS = ROOT / "examples" / "recipes" / "export"
COMMANDS = [
    (page.stem, line.strip())
    for page in sorted(PAGES.glob("*.md"))
    for line in page.read_text(encoding="utf-8").splitlines()
    if line.strip().startswith("blockwise-lr export ")
]
VISION = """
from transformers import ViTConfig, ViTForImageClassification


def build():
    return ViTForImageClassification(ViTConfig(num_hidden_layers=1))
"""


def module_of_the_page(page: str) -> str:
    """Return the page's mymodel.py; where timm is not installed, one with a vision model of transformers."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    code = re.search(r'^ *```python title="mymodel.py"\n(.*?)^ *```', text, re.DOTALL | re.MULTILINE)[1]
    if "import timm" not in code:
        return textwrap.dedent(code)
    if not is_there("timm"):
        return VISION
    import_timm()
    return textwrap.dedent(code)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[page for page, _ in COMMANDS])
def test_every_export_of_a_recipe_runs(capsys, monkeypatch, tmp_path, page, command):
    monkeypatch.chdir(tmp_path)
    source = shlex.split(command)[2].partition(":")[0]
    monkeypatch.delitem(sys.modules, source, raising=False)
    if source == "mymodel":
        Path("mymodel.py").write_text(module_of_the_page(page))
    elif ":" in command:
        shutil.copy(PROGRAMS / f"{source}.py", tmp_path)
    code, out, err = call(capsys, *shlex.split(command)[1:])
    assert (code, err) == (0, "")
    assert out
    written = re.search(r"--out (\S+)", command)
    assert written is None or (tmp_path / written[1]).read_text()


@pytest.mark.parametrize("program", sorted(PROGRAMS.iterdir()), ids=lambda path: path.name)
def test_every_program_and_configuration_has_one_page_that_shows_it(program):
    snippet = f'--8<-- "examples/recipes/export/{program.name}"'
    assert sum(snippet in page.read_text(encoding="utf-8") for page in PAGES.glob("*.md")) == 1


def test_every_trainer_has_a_row_in_the_table():
    table = (PAGES / "export.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| .* \| `(\w[\w-]*)` \|", table, re.MULTILINE) == [*TARGETS, *REFUSED]


@pytest.mark.parametrize("target", TARGETS)
def test_every_trainer_has_a_page_with_its_command(target):
    assert any(f"--to {target} " in page.read_text(encoding="utf-8") for page in PAGES.glob("*.md"))
