"""The program of each recipe runs, and its page shows that program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.processes import run_python
from support.vision import is_there

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "recipes"
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.py"))
NEEDS = {"lightning_module": ("lightning",), "timm_vit": ("timm", "torchvision"), "trl_sft_lora": ("trl",)}
"""What a recipe imports and CI need not have; timm itself needs torchvision."""
WITH_TIMM = """
import runpy, sys
from support.vision import import_timm
import_timm()
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs(recipe, tmp_path):
    missing = [name for name in NEEDS.get(recipe.stem, ()) if not is_there(name)]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    done = run_python(
        *(["-c", WITH_TIMM, recipe] if recipe.stem == "timm_vit" else [recipe]), folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_one_page_that_shows_it(recipe):
    snippet = f'--8<-- "examples/recipes/{recipe.name}"'
    assert sum(snippet in page.read_text(encoding="utf-8") for page in PAGES.glob("*.md")) == 1


def test_every_page_is_in_the_table():
    table = (PAGES / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((\w+\.md)\)", table))
    assert linked == {page.name for page in PAGES.glob("*.md")} - {"index.md"}
