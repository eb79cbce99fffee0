"""A clock that is stopped at every change between the parts of a program."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


class Clock:
    """Seconds by part, from when it is made; those of a part inside another are its own only.

    Example:
        >>> clock = Clock()
        >>> with clock.part("work"):
        ...     pass
        >>> list(clock.seconds)
        ['before and after', 'work']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._parts = ["before and after"]
        self._since = time.perf_counter()

    def _settle(self) -> None:
        now = time.perf_counter()
        self.seconds[self._parts[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._settle()
        self._parts.append(name)
        try:
            yield
        finally:
            self._settle()
            self._parts.pop()

    def of(self, owner: type, method: str, name: str) -> None:
        """Count every call of `owner.method` as part `name`."""
        call = getattr(owner, method)

        @wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        setattr(owner, method, counted)
