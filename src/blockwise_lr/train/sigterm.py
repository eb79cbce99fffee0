"""SIGTERM, by which schedulers take a machine back: the running step ends, a checkpoint is saved, the process exits.

transformers has a callback for it too (``enable_jit_checkpoint``). It saves three seconds after the signal, whatever
step each process is at by then, and in the middle of a step; here all processes stop after the same one.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback


class StopOnSigterm(TrainerCallback):
    """Ends training, with a checkpoint, after the step in which any process of the run was sent SIGTERM.

    Under torch.distributed the processes compare notes at the end of every step: one exchange of a single number, on
    the CPU, so that no process waits for its device. Further signals change nothing, since schedulers and torchrun
    each send their own. Outside of training, SIGTERM does what it did before.

    Call :meth:`close` at the end: Trainer has no event for a training that an error ends. A training that begins
    before that keeps the handler, and gives back the one that was there first.
    """

    def __init__(self) -> None:
        self.stopped_at: int | None = None
        """The step that was saved; None where nothing was received, or at the last step, where a run ends anyway."""
        self._received = False
        self._handles = False
        self._previous: Any = None
        self._group: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._handles:  # otherwise the handler is there, and a signal may have come
            self._received, self.stopped_at = False, None
            if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
                self._previous = signal.signal(signal.SIGTERM, self._receive)
                self._handles = True
        if dist.is_initialized() and self._group is None:
            self._group = dist.new_group(backend="gloo")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._received_by_any() and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True

    def _received_by_any(self) -> bool:
        if self._group is None:
            return self._received
        flag = torch.tensor(int(self._received))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def ignore(self) -> None:
        """From here on SIGTERM is ignored, :meth:`close` or not: of a process that is about to say why it ends."""
        if self._handles:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._handles = False

    def close(self) -> None:
        """Give SIGTERM back; also after an error."""
        if self._handles:
            # None: the one before was not Python's, and cannot be given back.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)
            self._handles = False
