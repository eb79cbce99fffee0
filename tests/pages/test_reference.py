"""Every public name is documented, and its package has a page in the API reference."""

from __future__ import annotations

import ast
import importlib
import re
from itertools import pairwise
from pathlib import Path

import pytest

import blockwise_lr

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "reference" / "api"
DOCUMENTED = {
    module: page
    for page in sorted(PAGES.glob("*.md"))
    for module in re.findall(r"^::: ([\w.]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
}


def packages_with_exports() -> list[str]:
    """Return the packages of the library that say what is public."""
    source = Path(blockwise_lr.__file__).parent
    return sorted(
        f"blockwise_lr.{path.parent.name}"
        for path in source.glob("*/__init__.py")
        if "__all__" in path.read_text(encoding="utf-8") and path.parent.name != "compare"
    )


def constants_with_docstrings() -> set[str]:
    """Return the names that some module assigns and explains in a string below."""
    found = set()
    for path in Path(blockwise_lr.__file__).parent.rglob("*.py"):
        for assigned, after in pairwise(ast.parse(path.read_text(encoding="utf-8")).body):
            match assigned, after:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]),
                    ast.Expr(value=ast.Constant(value=str())),
                ):
                    found.add(name)
    return found


CONSTANTS = constants_with_docstrings()


def is_documented(name: str, value: object) -> bool:
    """Whether a name has a docstring of its own; a dataclass without one gets its signature from Python."""
    docstring = (getattr(value, "__doc__", None) or "").strip()
    return name in CONSTANTS or (bool(docstring) and not docstring.startswith(f"{name}("))


def test_every_package_with_public_names_has_a_page():
    assert set(packages_with_exports()) <= set(DOCUMENTED)


def test_every_name_of_the_library_is_a_name_of_a_documented_package():
    named = {
        name for module in DOCUMENTED for name in getattr(importlib.import_module(module), "__all__", ())
    }
    assert set(blockwise_lr.__all__) <= named


@pytest.mark.parametrize("module", DOCUMENTED)
def test_every_public_name_has_a_docstring(module):
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None) or [
        name
        for name, value in vars(loaded).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module
    ]
    assert not [name for name in names if not is_documented(name, getattr(loaded, name))]


def test_a_name_without_a_docstring_is_found():
    assert not is_documented("undocumented", lambda: None)
    assert is_documented("PAPER_RATIOS", {})
