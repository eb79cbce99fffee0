"""The entry point of the command line: print --help and --version, run a command, and set the exit code.

This module imports no heavy package, so that --help is quick and Ctrl-C works from the start.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from blockwise_lr.cli.interrupts import INTERRUPTED, InterruptHandler
from blockwise_lr.errors import (
    LostProcessError,
    NonFiniteLossError,
    SigtermInterrupt,
    StorageError,
    Terminated,
    UserError,
)
from blockwise_lr.extras import check

USAGE = """\
usage: blockwise-lr COMMAND ...

Train Transformers with a separate learning rate for each block type.

  train PRESET      pre-train one model, or resume an unfinished run
  compare PRESET    train with uniform and with blockwise learning rates; write report.html
  tune PRESET       search the ratios of all blocks on a small proxy; write ratios.json and report.html
  robustness PRESET scale every ratio by 1/4 to 4; report how far each can move
  ablation PRESET   switch the blocks on one after another; report what each is worth
  scaling DIR ...   fit loss against parameters to finished comparisons of four sizes or more
  eval RUN          evaluate a checkpoint: loss and bits per byte on the held-out text or on --data
  generate RUN      sample text from a checkpoint, continuing --prompt
  sharpness MODEL   measure the sharpness of each block; write a table, sharpness.json and figures
  export MODEL      write the blocks' learning rates for another trainer (--to torchtitan ...),
                    or a run or a sharded checkpoint as a plain Hugging Face folder
  inspect MODEL     show which block each parameter belongs to, and why
  presets           list the presets

PRESET is a name from `blockwise-lr presets`, or the config.json of an earlier run to repeat.
MODEL is a preset, the folder of a run or of a checkpoint, or a Hugging Face model's folder or id.
For inspect and export, MODEL can also be module:function, where your function returns the model.
`blockwise-lr COMMAND PRESET --help` lists every setting with the values of that preset.
`blockwise-lr --print-completion bash` (or zsh) prints a script for completion with the Tab key.
"""

_COMMANDS = (
    "train",
    "compare",
    "tune",
    "robustness",
    "ablation",
    "scaling",
    "eval",
    "generate",
    "export",
    "sharpness",
    "inspect",
    "presets",
)
_TERMINATED = 128 + signal.SIGTERM
_PIPE_CLOSED = 128 + 13  # SIGPIPE, which Windows lacks
_TRAINING_COMMANDS = ("train", "compare", "tune", "robustness", "ablation")
# Windows lacks EDQUOT.
_DISK_ERRORS = [getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; if it fails, raise SystemExit with the exit code.

    Exit codes: 0 done; 2 bad input, with one line on stderr; 130 Ctrl-C; 143 SIGTERM; 1 anything else. If the reader
    of a pipe closes it, as `head` does, the commands that train exit with 141 and the others with 0.

    Args:
        arguments: the command-line arguments after `blockwise-lr`. Default: those of this process.

    Raises:
        SystemExit: the command fails or is interrupted.
    """
    ends_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else ""
    _escape_unencodable_output()
    with InterruptHandler(lambda: _interrupted(command), ends_process=ends_process) as interrupts:
        try:
            _run(command, arguments[1:])
            if sys.stdout is not None:  # Python sets it to None if it was closed before the start
                sys.stdout.flush()
        except (NonFiniteLossError, StorageError, LostProcessError) as error:
            _fail(str(error), 1)
        except Terminated as stopped:
            _fail_once(str(stopped), _TERMINATED)
        except BrokenPipeError:
            _discard_output()
            if command in _TRAINING_COMMANDS and not {"-h", "--help"} & set(arguments):
                raise SystemExit(_PIPE_CLOSED) from None
        except SigtermInterrupt:
            _interrupted(command, _TERMINATED)
        except KeyboardInterrupt:
            _interrupted(command)
        except SystemExit:
            raise
        except BaseException as error:
            if interrupts.received:  # a library that is interrupted during its import may raise any error
                _interrupted(command)
            if isinstance(error, UserError):
                _fail(str(error), 2)
            if isinstance(error, OSError) and error.filename is None and error.errno in _DISK_ERRORS:
                _discard_output()
                _fail(f"cannot write the output ({error.strerror}): make room or print it elsewhere", 1)
            raise


def _run(command: str, rest: list[str]) -> None:
    """Run a command, or print what an option such as --help asks for. `rest` holds the command's own arguments."""
    if command in ("", "-h", "--help", "help"):
        print(USAGE, end="")
        return
    if command == "--version":
        from blockwise_lr import __version__

        print(__version__)
        return
    if command not in (*_COMMANDS, "--print-completion"):
        raise UserError(f"no command {command!r}; the commands are {', '.join(_COMMANDS)}")
    try:
        check(
            "the command line needs", ("tyro", "rich", "filelock", "transformers", "accelerate", "tokenizers")
        )
    except ImportError as error:
        raise UserError(str(error)) from None
    if command == "--print-completion":
        from blockwise_lr.cli.completion import completion

        print(completion(" ".join(rest), _COMMANDS), end="")
        return
    importlib.import_module(f"blockwise_lr.cli.{command}").run(rest)


def _interrupted(command: str, code: int = INTERRUPTED) -> NoReturn:
    """Exit after a signal, and advise how to resume."""
    advice = ": run the same command again to resume" if command in _TRAINING_COMMANDS else ""
    _fail_once(f"interrupted{advice}", code)


def _fail_once(message: str, code: int) -> NoReturn:
    """Exit with an error that occurs on every rank. Only rank 0 prints it."""
    if os.environ.get("RANK", "0") != "0":
        raise SystemExit(code) from None
    _fail(message, code)


def _fail(message: str, code: int) -> NoReturn:
    """Print an error in one line on stderr, and exit."""
    # The message may quote names from files, whose escape sequences must not reach the terminal.
    line = "".join(each if each.isprintable() else "?" for each in " ".join(message.split()))
    with contextlib.suppress(OSError):  # stderr may be a closed pipe
        print(f"blockwise-lr: {line}", file=sys.stderr)
    raise SystemExit(code) from None


def _escape_unencodable_output() -> None:
    """Make stdout print characters that the terminal's encoding lacks as escapes, in place of an error.

    Python sets up stderr this way by default. The user's own choice (PYTHONIOENCODING=ascii:replace) is kept.
    """
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and out.errors in ("strict", "surrogateescape"):
        out.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Discard buffered and later output of stdout. Otherwise Python reports the write error again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
