"""The one exception that means: the user's input is wrong, and this sentence says how to mend it."""


class UserError(ValueError):
    """Bad input. The message is one line; the command line prints it without a traceback and exits with 2."""
