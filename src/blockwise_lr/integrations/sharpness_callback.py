"""A callback that measures the sharpness of every block while transformers' Trainer trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from blockwise_lr.extras import explained

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise explained(error, "SharpnessCallback needs") from None

from blockwise_lr.blocks import BlockMap
from blockwise_lr.integrations.estimator_monitors import EstimatorMonitors, sharpness_scalars
from blockwise_lr.sharpness.estimators import HessianProducts
from blockwise_lr.sharpness.measure import Estimator
from blockwise_lr.sharpness.predictions import LossFunction
from blockwise_lr.sharpness.report import SharpnessReport
from blockwise_lr.sharpness.training_gradients import squared_gradients

# torch's clip_grad_norm_ adds this to the norm before it divides by the norm.
_CLIP_EPSILON = 1e-6
# A gradient whose norm is below this fraction of max_grad_norm was not clipped. Above it, rounding in half precision
# leaves that open, so the logged norm decides.
_CLIPPED = 0.99


class SharpnessCallback(TrainerCallback):
    """Measure the sharpness of every block at chosen steps of a training run.

    The callback works with transformers.Trainer and
    :class:`blockwise_lr.integrations.transformers.BlockwiseTrainer`. Each measurement uses the same held-out batches
    and appends one line to sharpness.jsonl. It leaves the training unchanged, to the bit. Step n is the model after n
    optimizer steps, and step 0 is the model before training. When Trainer resumes from a checkpoint, the lines after
    that checkpoint are removed.

    Every measurement is also logged to TensorBoard and the other trackers as ``sharpness/<estimator>/<block>``.
    BlockwiseTrainer sets this up; with a plain Trainer, pass ``log=trainer.log``.

    Forward passes use the precision of training: bf16 under Trainer's ``bf16=True``. "hutchinson" is noisy in bf16.

    Args:
        batches: a few batches, the same on every process, in any form that
            :class:`blockwise_lr.sharpness.monitor.SharpnessMonitor` accepts. "empirical" and "optimizer" need none.
        every: measure at each multiple of this many steps, including step 0. Default 0: only at the steps in `at`.
        at: further steps to measure at.
        estimators: one or several. "fisher" (default) and "hutchinson" measure on the batches. "empirical" reads the
            unclipped gradient of the training step that starts at that step, so it cannot measure the last step.
            "optimizer" reads Adam's second moment, so it cannot measure step 0.
        tokens_per_step: number of predicted tokens (samples) in one optimizer step, over all processes and
            micro-batches. "empirical" and "optimizer" need it.
        path: the file to write. Default: sharpness.jsonl in ``args.output_dir``.
        seed, probes, loss_fn, hvp, blocks: as in :func:`blockwise_lr.measure_sharpness`.
        log: a function that logs a dictionary of scalars.

    Raises:
        ValueError: an estimator is given twice, or lacks an argument that it needs. Also as
            :func:`blockwise_lr.classify` when training starts, and as :func:`blockwise_lr.measure_sharpness` at a
            measurement. If the loss of the model is not finite, the measurement is skipped with a warning instead.

    A plain Trainer clips the gradient before any callback sees it, and reports the norm before clipping only in its
    log. When "empirical" meets a clipped gradient, the callback requests a log entry and undoes the clipping with the
    logged norm.

    Example:
        >>> callback = SharpnessCallback(batches, every=100)  # doctest: +SKIP
        >>> BlockwiseTrainer(model, args, train_dataset=data, callbacks=[callback]).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        batches: Iterable[Any] | Mapping[str, Any] | None = None,
        *,
        every: int = 0,
        at: Iterable[int] = (),
        estimators: Estimator | Sequence[Estimator] = "fisher",
        tokens_per_step: int | None = None,
        path: str | Path | None = None,
        seed: int = 0,
        probes: int = 1,
        loss_fn: LossFunction | None = None,
        hvp: HessianProducts = "auto",
        blocks: BlockMap | None = None,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self._monitors = EstimatorMonitors(
            batches, every=every, at=at, estimators=estimators, tokens_per_step=tokens_per_step, seed=seed,
            probes=probes, loss_fn=loss_fn, hvp=hvp, blocks=blocks,
        )  # fmt: skip
        self.estimators = self._monitors.estimators
        self._path = path
        self._log = self._given_log = log
        self._context: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._unclipped = False
        self._pending: tuple[int, npt.NDArray[np.float64]] | None = None

    def attach(
        self, log: Callable[[dict[str, float]], None], context: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        """Connect the callback to a BlockwiseTrainer, which then calls :meth:`gradients` itself.

        Args:
            log: the trainer's function that logs a dictionary of scalars; a `log` given to the constructor is kept.
            context: returns the context manager of the training's precision.
        """
        self._log = self._given_log or log
        self._context = context
        self._unclipped = True

    def detach(self) -> None:
        """Undo :meth:`attach` and release the model, so that a plain Trainer can use the callback next."""
        self._log = self._given_log
        self._context = nullcontext
        self._unclipped = False
        self._pending = None
        self._monitors.stop()

    # Trainer's events
    # -----------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        self._pending = None
        self._monitors.start(
            kwargs["model"],
            path=Path(args.output_dir) / "sharpness.jsonl" if self._path is None else Path(self._path),
            optimizer=getattr(optimizer, "optimizer", optimizer),  # inside accelerate's wrapper
            context=self._context,
            resume_step=state.global_step,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A log entry in on_train_begin would reach callbacks whose on_train_begin has not run yet.
        if state.global_step == 0:
            self._measure(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(state, control)
        if self._pending is not None:
            control.should_log = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        monitor = self._monitors.on_gradients
        if self._unclipped or monitor is None or not monitor.due(state.global_step):
            return
        squares = squared_gradients(monitor.parts)
        if args.max_grad_norm and not np.sqrt(squares.sum()) < _CLIPPED * args.max_grad_norm:
            self._pending = (state.global_step, squares)
        else:
            self._log_report(control, monitor.record_gradients(squares, state.global_step, 1.0))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        monitor = self._monitors.on_gradients
        if self._pending is None or monitor is None or "grad_norm" not in (logs or {}):
            return
        (step, squares), self._pending = self._pending, None
        # The quotient is 0 for an infinite norm; 1 avoids a division by 0, and the squares are NaN in any case.
        scale = min(1.0, args.max_grad_norm / (float(logs["grad_norm"]) + _CLIP_EPSILON)) or 1.0
        self._log_report(control, monitor.record_gradients(squares, step, scale))

    # -----------------------------------------------------------------------------------------------------------

    def gradients(self, state: Any, control: Any, *, scale: float) -> None:
        """Measure from the gradients of a step; BlockwiseTrainer calls this before it clips them.

        Args:
            state, control: Trainer's state and control objects.
            scale: the loss scale of fp16 training, 1 otherwise.
        """
        if (monitor := self._monitors.on_gradients) is not None:
            self._log_report(control, monitor.gradients(state.global_step, scale=scale))

    def _measure(self, state: Any, control: Any) -> None:
        for report in self._monitors.step(state.global_step):
            self._log_report(control, report)

    def _log_report(self, control: Any, report: SharpnessReport | None) -> None:
        if self._log is None or report is None:
            return
        should_log = control.should_log
        self._log(sharpness_scalars(report))
        control.should_log = should_log  # Trainer resets this flag on every log entry, its own or not
