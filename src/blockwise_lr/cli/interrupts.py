"""Handling of Ctrl-C: end the process at once during start-up, raise KeyboardInterrupt later."""

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

_startup_ended = threading.Event()


def end_startup() -> None:
    """Mark the end of a command's imports: from here on, Ctrl-C raises KeyboardInterrupt.

    Before this call, Ctrl-C ends the process at once, because some libraries swallow exceptions during their imports.
    torch, for example, does so while it looks for numpy.
    """
    _startup_ended.set()


class InterruptHandler(contextlib.AbstractContextManager["InterruptHandler"]):
    """A context manager in which SIGINT ends the command.

    Until :func:`end_startup` is called, SIGINT ends the process at once; later it raises KeyboardInterrupt. Python
    would print and drop that exception in destructors and garbage-collector callbacks; this class raises it again.

    Args:
        report: prints why the process ends, and raises SystemExit.
        ends_process: whether the process ends with the command. It then ignores every Ctrl-C after the first, since
            more of them would only interrupt the shutdown.

    Attributes:
        received: whether SIGINT was received.
    """

    def __init__(self, report: Callable[[], NoReturn], *, ends_process: bool) -> None:
        self.received = False
        self._report = report
        self._ends_process = ends_process
        self._previous: Any = None
        self._unraisable: Any = None

    def __enter__(self) -> InterruptHandler:
        _startup_ended.clear()
        main_thread = threading.current_thread() is threading.main_thread()
        # A process that was started in the background ignores SIGINT; leave that as it is.
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
        if self._ends_process and not _startup_ended.is_set():
            try:
                self._report()
            finally:
                os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    def _raise_again(self, unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # Let another thread raise it a little later: raised here, it would not leave this hook.
            again = threading.Timer(0.05, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            self._unraisable(unraisable)
