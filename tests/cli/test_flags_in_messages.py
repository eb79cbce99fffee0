"""Messages name flags as they are typed, and only flags that the parsers know."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import blockwise_lr
from blockwise_lr.cli.compare import CompareCommand
from blockwise_lr.cli.eval import EvalCommand
from blockwise_lr.cli.export import ExportCommand
from blockwise_lr.cli.generate import GenerateCommand
from blockwise_lr.cli.inspect import InspectCommand
from blockwise_lr.cli.scaling import ScalingCommand
from blockwise_lr.cli.sharpness import SharpnessCommand
from blockwise_lr.cli.sweep_flags import SweepCommand
from blockwise_lr.cli.train import TrainCommand
from blockwise_lr.cli.tune import TuneCommand
from support.commands import call

SOURCE = Path(blockwise_lr.__file__).parent
COMMANDS = (
    TrainCommand,
    CompareCommand,
    EvalCommand,
    ExportCommand,
    GenerateCommand,
    InspectCommand,
    ScalingCommand,
    SharpnessCommand,
    SweepCommand,
    TuneCommand,
)
OTHERS = {
    "--help",
    "--version",
    "--print-completion",
    "--tyro-print-completion",
    "--nproc-per-node",
    "--no-deps",
    "--relogin",
    "--use",
    "--error-unmatch",
    "--porcelain",
    "--long",
    "--embedding-lr",
    "--unembedding-lr",
    "--matrix-lr",
    "--scalar-lr",
    "--min-lr",
}
"""Flags of blockwise-lr itself, and of torchrun, pip, wandb, accelerate, git, zstd, tyro, nanochat and Megatron-LM."""


def fields(cls: Any) -> Iterator[str]:
    for field in dataclasses.fields(cls):
        hint = get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            yield from fields(hint)
        else:
            yield field.name


FIELDS = {name for command in COMMANDS for name in fields(command)}
FLAGS = {f"--{name.replace('_', '-')}" for name in FIELDS}


def messages(tree: ast.AST, *, only: tuple[str, ...] = ()) -> Iterator[str]:
    """The texts in a module that are no docstrings; with `only`, those in a call of one of these names."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inside = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in only
    ]
    for root in inside if only else [tree]:
        for node in ast.walk(root):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
                yield node.value


PAGES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_every_flag_in_a_text_is_one_that_can_be_typed(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {
        flag for text in messages(tree) for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", text)
    }
    assert named <= FLAGS | OTHERS


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_a_setting_in_an_error_of_the_command_line_has_its_flag(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    with_underscore = {name for name in FIELDS if "_" in name}
    bare = {word for text in messages(tree, only=("UserError",)) for word in re.findall(r"\w+", text)}
    assert not bare & with_underscore


def test_the_flags_are_those_that_the_parser_takes(capsys):
    _, out, _ = call(capsys, "compare", "quickstart", "--help")
    shown = set(re.findall(r"--[a-z][a-z0-9-]*", out))
    assert {f"--{name.replace('_', '-')}" for name in fields(CompareCommand)} <= shown | {
        "--preset"
    }  # comes first, without its flag


@pytest.mark.parametrize("asks", ["-h", "--help"])
def test_presets_answers_help(capsys, asks):
    code, out, err = call(capsys, "presets", asks)
    assert (code, err) == (0, "")
    assert out.startswith("usage: blockwise-lr presets")


@pytest.mark.parametrize(
    "command", ["train", "compare", "tune", "eval", "generate", "export", "sharpness", "inspect"]
)
def test_every_command_answers_help(capsys, command):
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    assert "usage: blockwise-lr" in out


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", ["train", "compare", "tune", "eval", "sharpness"])
def test_help_is_wrapped_at_the_width_of_the_terminal(capsys, monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", str(width))
    _, out, _ = call(capsys, command, "--help")
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    (column,) = {line.index("show this help") for line in lines if "show this help" in line}
    continued = 0
    for line, after in itertools.pairwise(line.replace("│", " ") for line in lines):
        text, more = line[column:].split(), after[column:].split()
        if text and more and not after[:column].strip() and not line[column - 2 : column].strip():
            continued += 1
            assert column + len(" ".join([*text, more[0]])) >= width - 2, f"{text} ends early"
    assert continued > 2
