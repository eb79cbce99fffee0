"""Parse flags and presets for all commands, and report bad ones in one line."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
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
    """Return the configuration that the first argument names, and the other arguments.

    Args:
        command: the command's name, for messages.
        arguments: the words after it; the first is a preset's name or the path of a config.json.

    Raises:
        UserError: no first argument, an unknown preset, or a file that holds no configuration.
    """
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
    # The name becomes part of the default --out; a file from someone else must not point it to another folder.
    if not re.fullmatch(r"\w[\w.-]*", config.preset):
        raise UserError(
            f"the configuration {path} has {config.preset!r} as its preset; expected letters, digits, . and -"
        )
    return config, arguments[1:]


def parse(cls: type[T], command: str, arguments: list[str], default: T | None = None) -> T:
    """Parse a command's flags with tyro.

    Raises:
        UserError: a flag is unknown or has a bad value; the message is one line.
    """
    given: dict[str, Any] = {"description": _wrapped_description(cls)}
    if default is not None:
        given["default"] = default
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints), _joined_help_lines():
            parsed: T = tyro.cli(cls, prog=f"blockwise-lr {command}", args=arguments, **given)
            return parsed
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        plain = re.sub(r"\x1b\[[0-9;]*m", "", complaints.getvalue())
        # Drop the frame's title, which repeats the message; without Unicode, tyro underlines it instead.
        untitled = re.sub(r"^[╭+].*$|\A *[^\n]*\n *-{5,} *$", "", plain, flags=re.MULTILINE)
        text = re.sub(r"[─-╿]|-{5,}|[|+]", " ", untitled)
        raise UserError(" ".join(text.split())) from None


def _wrapped_description(cls: type) -> str:
    """Return a command's docstring, wrapped at the terminal's width with a hanging indent.

    tyro prints a description without wrapping it, and keeps only the line breaks before an indented line.
    """
    width = shutil.get_terminal_size().columns
    wrap = textwrap.TextWrapper(width, subsequent_indent="  ", break_on_hyphens=False)
    return "\n\n".join(wrap.fill(paragraph) for paragraph in _paragraphs(cls.__doc__))


@contextlib.contextmanager
def _joined_help_lines() -> Iterator[None]:
    """Join the lines of each field's docstring while tyro reads it, so that --help wraps whole paragraphs.

    tyro keeps a line break before an indented line, and every line of a field's docstring but the first is indented.
    """
    import docstring_parser  # tyro imports it anyway, and calls this function through the module

    original = docstring_parser.parse_from_object

    def parse_from_object(*args: Any, **kwargs: Any) -> docstring_parser.Docstring:
        docstring = original(*args, **kwargs)
        for field in docstring.params:
            field.description = "\n\n".join(_paragraphs(field.description)) or None
        return docstring

    docstring_parser.parse_from_object = parse_from_object
    try:
        yield
    finally:
        docstring_parser.parse_from_object = original


def _paragraphs(text: str | None) -> list[str]:
    """Return the paragraphs of a docstring, each as one line."""
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text or "")]


def needs(command: str, *packages: str) -> None:
    """Check before a command starts that the packages it needs at its end are installed.

    Raises:
        UserError: a package is missing; the message says how to install it.
    """
    try:
        check(f"{command} needs", packages)
    except ImportError as error:
        raise UserError(str(error)) from None


def command_line(name: str, arguments: list[str]) -> str:
    """Return the command line as one string that a shell accepts."""
    return shlex.join(["blockwise-lr", name, *arguments])
