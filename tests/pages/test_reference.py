"""Every public name is documented, and its package has a page in the API reference."""

from __future__ import annotations

import ast
import importlib
import re
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


def constants_with_docstrings(module: str) -> set[str]:
    """Return the names that are assigned in a module and followed by a string."""
    body = ast.parse(Path(importlib.import_module(module).__file__).read_text(encoding="utf-8")).body
    return {
        ast.unparse(assigned.target if isinstance(assigned, ast.AnnAssign) else assigned.targets[0])
        for assigned, after in zip(body, body[1:])
        if isinstance(assigned, ast.Assign | ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }


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
    files = list(Path(loaded.__file__).parent.glob("*.py"))
    constants: set[str] = set()
    for file in files:
        if file.stem != "__init__":
            package = loaded.__package__
            constants |= constants_with_docstrings(f"{package}.{file.stem}")
    undocumented = [
        name
        for name in names
        if name not in constants and not (getattr(getattr(loaded, name), "__doc__", None) or "").strip()
    ]
    assert not undocumented
