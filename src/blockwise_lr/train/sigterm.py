"""Handle SIGTERM, which job schedulers send to preempt a run: finish the step, save a checkpoint, exit.

transformers' own callback (``enable_jit_checkpoint``) saves three seconds after the signal. Ranks can then be in the
middle of different steps. Here, all ranks stop after the same step.
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
    """Ends training, with a checkpoint, after the step in which any rank receives SIGTERM.

    Under torch.distributed, the ranks exchange one number at the end of every step. They do so on the CPU, to avoid a
    host sync. Repeated signals have no effect, because schedulers and torchrun each send their own. Outside of
    training, the previous handler is in place.

    Call :meth:`close` at the end, because Trainer has no event for a training that an error ends. A training that
    begins before :meth:`close` keeps the handler, and its end restores the original one.
    """

    def __init__(self) -> None:
        self.stopped_at: int | None = None
        """The step that was saved; None without a signal, or if it came in the last step, where the run ends anyway."""
        self._received = False
        self._handles = False
        self._previous: Any = None
        self._group: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._handles:  # an installed handler may have received a signal already
            self._received, self.stopped_at = False, None
            if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
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
        """Ignore SIGTERM from now on, even after :meth:`close`, in a process that should report a failure."""
        if self._handles:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._handles = False

    def close(self) -> None:
        """Restore the previous handler of SIGTERM. Call this after an error too."""
        if self._handles:
            # None: the previous handler was not installed by Python, so it cannot be restored.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)
            self._handles = False
