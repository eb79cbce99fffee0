"""The exceptions that the command line prints in one line."""

from __future__ import annotations


class UserError(ValueError):
    """The input is not usable. The command line prints the one-line message without a traceback and exits with 2."""


class UnsupportedGradientError(ValueError, RuntimeError):
    """A gradient is sparse or a parameter complex, so it cannot be measured or stepped. The message names it.

    The class is a ValueError, as all errors about settings are, and a RuntimeError, which torch's optimizers raise.
    """


class StorageError(RuntimeError):
    """A file cannot be written, most often because the disk is full. The command line exits with 1.

    Args:
        path: the file, or its folder.
        reason: the system's error message.
    """

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(
            f"cannot write {path} ({reason}): make room or choose another folder, then give the same command again; "
            "existing checkpoints are intact"
        )
        self._about = (str(path), reason)

    def __reduce__(self) -> tuple[type[StorageError], tuple[str, str]]:
        return type(self), self._about  # rank 0 sends the error to the other ranks, pickled


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became NaN or infinite, so the run cannot go on. The command line exits with 1.

    Args:
        step: the optimizer step at which it was detected.
        what: "loss" or "gradient".
        where: a description of the affected blocks and parameters; empty if they are not known.
    """

    def __init__(self, step: int, what: str = "loss", where: str = "") -> None:
        culprits = f"; {where}" if where else ""
        super().__init__(
            f"the {what} was no longer finite at step {step}: the run diverged; lower --base-lr or the largest ratio, "
            f"or warm up for longer (the last complete checkpoint is kept){culprits}"
        )
        self.step = step
        self.what = what
        self.where = where


class LostProcessError(RuntimeError):
    """Another process of the run has exited, so this one cannot continue. The command line exits with 1."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this run has exited, so all processes stop: its error is printed above, or torchrun "
            "reports how it was killed; the same command goes on from the last checkpoint"
        )


class Terminated(Exception):  # noqa: N818 (stopping on request is no error)
    """SIGTERM ended a run after a step, and a checkpoint was saved. The command line exits with 143, 128 + SIGTERM.

    Args:
        step: the step at which the checkpoint was saved.
        checkpoint: the checkpoint's folder.
    """

    def __init__(self, step: int, checkpoint: object) -> None:
        super().__init__(f"SIGTERM: saved step {step} in {checkpoint}; the same command goes on from there")
        self.step = step


class SigtermInterrupt(KeyboardInterrupt):
    """SIGTERM was received; raised in the main thread like Ctrl-C. The command line exits with 143, 128 + SIGTERM."""
