"""The commands of the recipes for other trainers run, and the table of targets is complete."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from blockwise_lr.export import REFUSED, TARGETS
from support.commands import call

PAGES = Path(__file__).parents[2] / "docs" / "recipes"
COMMANDS = [
    (page.stem, line.strip())
    for page in sorted(PAGES.glob("*.md"))
    for line in page.read_text(encoding="utf-8").splitlines()
    if line.strip().startswith("blockwise-lr export ") and "mymodel:build" not in line
]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[page for page, _ in COMMANDS])
def test_every_export_of_a_recipe_runs(capsys, monkeypatch, tmp_path, page, command):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *shlex.split(command)[1:])
    assert (code, err) == (0, "")
    assert out
    written = re.search(r"--out (\S+)", command)
    assert written is None or (tmp_path / written[1]).read_text()


def test_every_trainer_has_a_row_in_the_table():
    table = (PAGES / "export.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| .* \| `(\w[\w-]*)` \|", table, re.MULTILINE) == [*TARGETS, *REFUSED]


@pytest.mark.parametrize("target", TARGETS)
def test_every_trainer_has_a_page_with_its_command(target):
    assert any(f"--to {target} " in page.read_text(encoding="utf-8") for page in PAGES.glob("*.md"))
