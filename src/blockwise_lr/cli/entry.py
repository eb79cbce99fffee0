"""Entry point of the command line: answers --help and --version, and turns every end of a command into an exit code.

This module imports nothing heavy, so that --help is quick and Ctrl-C gets an answer from the first moment on.
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

from blockwise_lr.cli.interrupts import INTERRUPTED, CtrlC
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

A learning rate of its own for every block type of a Transformer.

  train PRESET      pre-train one model; resumes an unfinished run
  compare PRESET    uniform against blockwise learning rates, side by side; writes report.html
  eval RUN          losses and bits per byte of a checkpoint, on the held-out text or on any other (--data)
  generate RUN      a sample from a checkpoint, behind --prompt
  sharpness MODEL   how sharp each block is, with error bars; writes a table, sharpness.json and figures
  export RUN        a plain Hugging Face folder of a run, or of a sharded checkpoint
  inspect MODEL     which parameter is in which block, and why
  presets           the names of the presets

PRESET is a name from `blockwise-lr presets`, or the config.json of an earlier run, to repeat it.
MODEL is a preset, the folder of a run or of a checkpoint, or a Hugging Face model's folder or id;
for inspect also module:function, a function of yours that returns the model.
`blockwise-lr COMMAND PRESET --help` shows every setting with that preset's values.
`blockwise-lr --print-completion bash` (or zsh) prints a script for completion with the Tab key.
"""

_COMMANDS = ("train", "compare", "eval", "generate", "export", "sharpness", "inspect", "presets")
_TERMINATED = 128 + signal.SIGTERM
_PIPE_CLOSED = 128 + 13  # SIGPIPE, which Windows lacks
_TRAINING = ("train", "compare")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Exit codes: 0 done; 2 bad input, with one line on stderr; 130 Ctrl-C; 143 SIGTERM; 1 anything else. When the reader
    of a pipe closes it, as `head` does, the commands that train exit with 141 and the others with 0.

    Args:
        arguments: the words after `blockwise-lr`; None: those of this process.
    """
    ends_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else ""
    _print_any_character()
    with CtrlC(lambda: _interrupted(command), ends_process=ends_process) as ctrl_c:
        try:
            _run(command, arguments[1:])
            if sys.stdout is not None:  # Python's stand-in for one that was closed before the start
                sys.stdout.flush()
        except (NonFiniteLossError, StorageError, LostProcessError) as error:
            _fail(str(error), 1)
        except Terminated as stopped:
            _fail_once(str(stopped), _TERMINATED)
        except BrokenPipeError:
            _stop_printing()
            if command in _TRAINING and not {"-h", "--help"} & set(arguments):
                raise SystemExit(_PIPE_CLOSED) from None
        except SigtermInterrupt:
            _interrupted(command, _TERMINATED)
        except KeyboardInterrupt:
            _interrupted(command)
        except SystemExit:
            raise
        except BaseException as error:
            if ctrl_c.received:  # a library that was interrupted in its import raises what it likes
                _interrupted(command)
            if isinstance(error, UserError):
                _fail(str(error), 2)
            if isinstance(error, OSError) and error.filename is None and error.errno in _NO_ROOM:
                _stop_printing()
                _fail(f"cannot write the output ({error.strerror}): make room or print it elsewhere", 1)
            raise


def _run(command: str, rest: list[str]) -> None:
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


_NO_ROOM = [getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO")]  # Windows lacks one


def _interrupted(command: str, code: int = INTERRUPTED) -> NoReturn:
    goes_on = ": give the same command again to go on" if command in _TRAINING else ""
    _fail_once(f"interrupted{goes_on}", code)


def _fail_once(message: str, code: int) -> NoReturn:
    """Fail with a message of which all processes of a run know: rank 0 prints it."""
    if os.environ.get("RANK", "0") != "0":
        raise SystemExit(code) from None
    _fail(message, code)


def _fail(message: str, code: int) -> NoReturn:
    # The message may quote names out of files: no escape sequence in them reaches the terminal.
    line = "".join(each if each.isprintable() else "?" for each in " ".join(message.split()))
    with contextlib.suppress(OSError):  # stderr may be a closed pipe
        print(f"blockwise-lr: {line}", file=sys.stderr)
    raise SystemExit(code) from None


def _print_any_character() -> None:
    r"""Let stdout print every character, those that the terminal's encoding lacks as \N escapes.

    stderr does so in any Python. A choice of the user's (PYTHONIOENCODING=ascii:replace) is kept.
    """
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and out.errors in ("strict", "surrogateescape"):
        out.reconfigure(errors="backslashreplace")


def _stop_printing() -> None:
    """Send what is left for stdout nowhere; Python would complain once more at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
