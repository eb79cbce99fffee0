"""Describe an error of another library in one line."""

from __future__ import annotations


def reason(error: BaseException) -> str:
    """Return the error's type and the first line of its message.

    A line that ends in a colon is continued with the next line.

    Args:
        error: the error to describe.

    Example:
        >>> reason(ValueError("Validation error for field 'size':\\n    TypeError: expected int\\nmore"))
        "ValueError: Validation error for field 'size': TypeError: expected int"
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    ends = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return f"{type(error).__name__}: {' '.join(lines[: ends + 1])}"
