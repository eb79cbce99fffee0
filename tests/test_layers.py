"""Imports point downwards through the folders, never in a circle, and one name belongs to one module."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import blockwise_lr

SOURCE = Path(blockwise_lr.__file__).parent
LAYERS = [
    {
        "arguments",
        "errors",
        "estimator_names",
        "extras",
        "files",
        "fp32",
        "json_values",
        "locks",
        "reason",
    },
    {"blocks"},
    {"distributed", "drawing"},
    {"sharpness"},
    {"optim"},
    {"export"},
    {"optimizers"},
    {"directional"},
    {"experimental"},
    {"checkpoints"},
    {"integrations"},
    {"data"},
    {"train"},
    {"analysis"},
    {"compare"},
    {"tune"},
    {"cli"},
]
"""From the bottom up: a folder or module imports from its own layer and from those before it."""

LEVELS = {name: level for level, layer in enumerate(LAYERS) for name in layer}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCE.rglob("*.py")}


def at_runtime(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, without those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from at_runtime(child)


def imports(module: str) -> set[str]:
    """The modules of this package that a module imports, inside of functions too."""
    found = set()
    for node in at_runtime(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in full}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return found - {module}


GRAPH = {module: imports(module) for module in MODULES}


def folder(module: str) -> str:
    return module.split(".")[1]


def test_every_folder_has_a_layer():
    assert {folder(module) for module in MODULES if "." in module} - {"__main__"} == set(LEVELS)


@pytest.mark.parametrize("name", sorted(LEVELS))
def test_a_folder_imports_from_its_own_layer_and_those_below(name):
    upwards = [
        f"{module} imports {other}"
        for module in GRAPH
        if "." in module and folder(module) == name
        for other in GRAPH[module]
        if "." in other and LEVELS[folder(other)] > LEVELS[name]
    ]
    assert not upwards


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_one_module_stands_between_experimental_methods_and_the_rest():
    users = {
        module
        for module, others in GRAPH.items()
        if any(other.startswith("blockwise_lr.experimental") for other in others)
        and not module.startswith("blockwise_lr.experimental")
    }
    assert users == {"blockwise_lr.integrations.moving_ratios"}


def test_the_graph_was_read():
    assert "blockwise_lr.blocks.classify" in GRAPH["blockwise_lr.optim.block_values"]
    assert sum(map(len, GRAPH.values())) > 300


def test_no_two_modules_have_one_name():
    """A command is called what the folder that it runs is called."""
    names = Counter(
        path.stem
        for module, path in MODULES.items()
        if path.stem not in ("__init__", "__main__") and folder(module) != "cli"
    )
    assert not [name for name, count in names.items() if count > 1]
