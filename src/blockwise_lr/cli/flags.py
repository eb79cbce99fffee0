"""What the commands share: reading flags and presets, and one line for bad ones."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any, TypeVar

import tyro

from blockwise_lr.errors import UserError
from blockwise_lr.extras import check
from blockwise_lr.train.config import TrainConfig, config_from_dict
from blockwise_lr.train.presets import get_preset
from blockwise_lr.train.run_folder import read_configuration

T = TypeVar("T")


def named_preset(command: str, arguments: list[str]) -> tuple[TrainConfig, list[str]]:
    """The configuration that the first argument names, and the other arguments."""
    if arguments and arguments[0] in ("-h", "--help"):
        return get_preset("quickstart"), arguments
    if not arguments or arguments[0].startswith("-"):
        raise UserError(
            f"{command} needs the name of a preset first, such as: blockwise-lr {command} quickstart"
        )
    path = Path(arguments[0])
    if path.suffix.lower() != ".json":
        return get_preset(arguments[0]), arguments[1:]
    values = read_configuration(path)
    fields = values.get("train", values)
    if not isinstance(fields, dict):
        raise UserError(
            f'the configuration {path} has {type(fields).__name__} as its "train"; expected an object of fields'
        )
    config = config_from_dict(fields)
    # It names the default --out, which someone else's file must not lead elsewhere.
    if not re.fullmatch(r"\w[\w.-]*", config.preset):
        raise UserError(
            f"the configuration {path} has {config.preset!r} as its preset; expected letters, digits, . and -"
        )
    return config, arguments[1:]


def parse(cls: type[T], command: str, arguments: list[str], default: T | None = None) -> T:
    """Parse flags with tyro; bad ones give one line."""
    given: dict[str, Any] = {} if default is None else {"default": default}
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            parsed: T = tyro.cli(cls, prog=f"blockwise-lr {command}", args=arguments, **given)
            return parsed
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        plain = re.sub(r"\x1b\[[0-9;]*m", "", complaints.getvalue())
        # The frame's title says it once more; where there is no Unicode, it is underlined instead.
        untitled = re.sub(r"^[╭+].*$|\A *[^\n]*\n *-{5,} *$", "", plain, flags=re.MULTILINE)
        text = re.sub(r"[─-╿]|-{5,}|[|+]", " ", untitled)
        raise UserError(" ".join(text.split())) from None


def needs(command: str, *packages: str) -> None:
    """Refuse a command before it begins, where packages that it uses only at its end are missing.

    Raises:
        UserError: one is missing; says how to install it.
    """
    try:
        check(f"{command} needs", packages)
    except ImportError as error:
        raise UserError(str(error)) from None


def command_line(name: str, arguments: list[str]) -> str:
    return shlex.join(["blockwise-lr", name, *arguments])
