"""What another library raised, in one line."""

from __future__ import annotations


def reason(error: BaseException) -> str:
    """The type and the beginning of the message: its first line, and the next where that one ends in a colon.

    Example:
        >>> reason(ValueError("Validation error for field 'size':\\n    TypeError: expected int\\nmore"))
        "ValueError: Validation error for field 'size': TypeError: expected int"
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    ends = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return f"{type(error).__name__}: {' '.join(lines[: ends + 1])}"
