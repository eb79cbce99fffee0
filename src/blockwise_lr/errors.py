"""The exceptions that the command line prints as one line."""


class UserError(ValueError):
    """Bad input. The message is one line; the command line prints it without a traceback and exits with 2."""


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite, so the run cannot go on. The command line exits with 1.

    Args:
        step: the optimizer step by which it was seen.
    """

    def __init__(self, step: int) -> None:
        super().__init__(
            f"the loss was no longer finite at step {step}: the run diverged; lower --base-lr or the largest ratio, "
            f"or warm up for longer (the last whole checkpoint is kept)"
        )
        self.step = step
