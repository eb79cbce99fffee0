"""The exceptions that the command line prints as one line."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message is one line; the command line prints it without a traceback and exits with 2."""


class UnsupportedGradientError(ValueError, RuntimeError):
    """A sparse gradient or a complex parameter, which cannot be measured or stepped. The message names it.

    A ValueError as all refusals of settings, and a RuntimeError as torch's own optimizers raise.
    """


class StorageError(RuntimeError):
    """A file could not be written: a full disk, most often. The command line exits with 1.

    Args:
        path: the file, or the folder it belongs to.
        reason: what the system said.
    """

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(
            f"cannot write {path} ({reason}): make room or choose another folder, then give the same command again; "
            "what was whole before still is"
        )
        self._about = (str(path), reason)

    def __reduce__(self) -> tuple[type[StorageError], tuple[str, str]]:
        return type(self), self._about  # rank 0 sends it to the others


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became NaN or infinite, so the run cannot go on. The command line exits with 1.

    Args:
        step: the optimizer step by which it was seen.
        what: "loss" or "gradient".
        where: blocks and parameters, in words; empty where they are not known.
    """

    def __init__(self, step: int, what: str = "loss", where: str = "") -> None:
        culprits = f"; {where}" if where else ""
        super().__init__(
            f"the {what} was no longer finite at step {step}: the run diverged; lower --base-lr or the largest ratio, "
            f"or warm up for longer (the last whole checkpoint is kept){culprits}"
        )
        self.step = step
        self.what = what
        self.where = where


class LostProcessError(RuntimeError):
    """Another process of a run under torchrun is gone, so this one cannot go on. The command line exits with 1."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this run has ended, so all end: what it said stands above, or torchrun says how it was "
            "killed; the same command goes on from the last checkpoint"
        )


class Terminated(Exception):  # noqa: N818 (what was asked for is no error)
    """SIGTERM ended a run after a step, with a checkpoint. The command line exits with 143, 128 + SIGTERM.

    Args:
        step: the step that was saved.
        checkpoint: its folder.
    """

    def __init__(self, step: int, checkpoint: object) -> None:
        super().__init__(f"SIGTERM: saved step {step} in {checkpoint}; the same command goes on from there")
        self.step = step


class SigtermInterrupt(KeyboardInterrupt):
    """SIGTERM, raised in the main thread as Ctrl-C is. The command line exits with 143, 128 + SIGTERM."""
