"""Ctrl-C: when it ends a command at once, and when it is an exception."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT
"""The exit code after Ctrl-C."""

_at_work = threading.Event()


def at_work() -> None:
    """Call this when a command has imported what it needs and begins: from here on Ctrl-C is an exception.

    Before, it ends the process at once. Some libraries drop an exception in their imports and go on: torch does when it
    looks for numpy.
    """
    _at_work.set()


class CtrlC(contextlib.AbstractContextManager["CtrlC"]):
    """While a command runs, SIGINT ends it: at once until :func:`at_work`, later by KeyboardInterrupt.

    KeyboardInterrupt is also raised again where Python would print and drop it, in destructors and callbacks of the
    garbage collector.

    Args:
        report: print why the process ends, and raise SystemExit.
        ends_process: whether the process ends with the command. After one Ctrl-C it then ignores more of them, which
            would only interrupt the ending.

    Attributes:
        received: whether SIGINT came.
    """

    def __init__(self, report: Callable[[], NoReturn], *, ends_process: bool) -> None:
        self.received = False
        self._report = report
        self._ends_process = ends_process
        self._previous: Any = None
        self._unraisable: Any = None

    def __enter__(self) -> CtrlC:
        _at_work.clear()
        main_thread = threading.current_thread() is threading.main_thread()
        # A process that was started in the background ignores SIGINT, and goes on doing so.
        if main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._previous = signal.signal(signal.SIGINT, self._receive)
            self._unraisable, sys.unraisablehook = sys.unraisablehook, self._raise_again
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            sys.unraisablehook = self._unraisable
            ignore = self.received and self._ends_process
            signal.signal(signal.SIGINT, signal.SIG_IGN if ignore else self._previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self._ends_process and not _at_work.is_set():
            try:
                self._report()
            finally:
                os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    def _raise_again(self, unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # Later, by another thread: here it would only be raised in this function.
            again = threading.Timer(0.05, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            self._unraisable(unraisable)
