"""SharpnessCallback: the sharpness of every block while transformers' Trainer trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockwise_lr.extras import explained

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise explained(error, "SharpnessCallback needs") from None

from blockwise_lr.blocks import BlockMap
from blockwise_lr.sharpness.estimators import HessianProducts
from blockwise_lr.sharpness.measure import Estimator
from blockwise_lr.sharpness.monitor import ON_BATCHES, SharpnessMonitor, check_monitor
from blockwise_lr.sharpness.predictions import LossFunction
from blockwise_lr.sharpness.report import SharpnessReport
from blockwise_lr.sharpness.training_gradients import squared_gradients

# What clip_grad_norm_ adds to the norm before it divides by it.
_CLIP_EPSILON = 1e-6
# Gradients in half precision have their norm to about this; above it, only the norm before tells whether it was cut.
_CLIPPED = 0.99


class SharpnessCallback(TrainerCallback):
    """Measures at chosen steps, always on the same held-out batches, and writes a line of sharpness.jsonl each time.

    For transformers.Trainer and :class:`blockwise_lr.integrations.transformers.BlockwiseTrainer`. The training stays
    as it is to the bit. Step n is the model after n optimizer steps; step 0 is before training. When Trainer resumes
    from a checkpoint, the file is cut back to it.

    Every measurement goes to TensorBoard and the other trackers as ``sharpness/<estimator>/<block>``:
    BlockwiseTrainer sees to that; a plain Trainer needs ``log=trainer.log``.

    Precision is that of training: under Trainer's ``bf16=True`` forward passes are in bf16, those of "hutchinson" too,
    which is noisy there.

    Args:
        batches: as :class:`blockwise_lr.sharpness.monitor.SharpnessMonitor` takes them: a few, the same on every
            process. Not needed for "empirical" and "optimizer".
        every: measure at each multiple of this many steps, 0 included. Default 0: only at `at`.
        at: steps to measure at besides.
        estimators: one or several: "fisher" (default) and "hutchinson", on the batches; "empirical", off the
            gradient of the training step that starts at that step, before clipping (so never at the last step);
            "optimizer", off Adam's second moment (not at step 0).
        tokens_per_step: predicted tokens (samples) in one optimizer step, over all processes and micro-batches: for
            "empirical" and "optimizer".
        path: of the file. Default: sharpness.jsonl in ``args.output_dir``.
        seed, probes, loss_fn, hvp, blocks: as in :func:`blockwise_lr.measure_sharpness`.
        log: takes a dictionary of scalars.

    Raises:
        ValueError: an estimator twice, or without what it needs; when training starts, as
            :func:`blockwise_lr.classify`; at a measurement, as :func:`blockwise_lr.measure_sharpness`, except that a
            model whose loss is not finite is passed over with a warning.

    A plain Trainer clips before a callback sees the gradient, and tells the norm that it had only in its log. Where
    "empirical" meets a clipped gradient it asks for a line of the log, and undoes the clipping with it.

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
        self.estimators = (estimators,) if isinstance(estimators, str) else tuple(estimators)
        if not self.estimators or len(set(self.estimators)) < len(self.estimators):
            raise ValueError(f"estimators are {list(self.estimators)}; expected one or more, each once")
        if batches is not None and not isinstance(batches, Mapping):
            with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed from the global state
                batches = list(batches)
        self._batches = batches
        self._every, self._at = every, tuple(at)
        for estimator in self.estimators:
            check_monitor(
                estimator, every, self._at, self._batches_for(estimator) is not None, tokens_per_step
            )
        self._path = path
        self._settings: dict[str, Any] = {
            "every": every, "at": self._at, "seed": seed, "probes": probes, "hvp": hvp, "blocks": blocks,
            "loss_fn": loss_fn, "tokens_per_step": tokens_per_step,
        }  # fmt: skip
        self._log = self._given_log = log
        self._context: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._unclipped = False
        self._monitors: list[SharpnessMonitor] = []
        self._reader: SharpnessMonitor | None = None
        self._pending: tuple[int, Tensor] | None = None

    def attach(
        self, log: Callable[[dict[str, float]], None], context: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        """What BlockwiseTrainer does: it logs, knows the training's precision, and calls :meth:`gradients` itself."""
        self._log = self._given_log or log
        self._context = context
        self._unclipped = True

    def detach(self) -> None:
        """Undo :meth:`attach`, and let the model go: a plain Trainer may take the callback next."""
        self._log = self._given_log
        self._context = nullcontext
        self._unclipped = False
        self._pending, self._reader, self._monitors = None, None, []

    # Trainer's events
    # -----------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        self._pending, self._reader, self._monitors = None, None, []
        for estimator in self.estimators:
            monitor = SharpnessMonitor(
                kwargs["model"],
                self._batches_for(estimator),
                estimator=estimator,
                path=Path(args.output_dir) / "sharpness.jsonl" if self._path is None else self._path,
                optimizer=getattr(optimizer, "optimizer", optimizer),  # inside accelerate's wrapper
                context=self._context,
                resume_step=state.global_step,
                **self._settings,
            )
            if monitor.reads_gradients:
                self._reader = monitor
            else:
                self._monitors.append(monitor)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not at on_train_begin: what is logged there reaches callbacks that have not begun.
        if state.global_step == 0:
            self._measure(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(state, control)
        if self._pending is not None:
            control.should_log = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reader = self._reader
        if self._unclipped or reader is None or not reader.due(state.global_step):
            return
        squares = squared_gradients(reader.parts)
        if args.max_grad_norm and not squares.sum().sqrt() < _CLIPPED * args.max_grad_norm:
            self._pending = (state.global_step, squares)
        else:
            self._show(control, reader.record_gradients(squares, state.global_step, 1.0))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._pending is None or self._reader is None or "grad_norm" not in (logs or {}):
            return
        (step, squares), self._pending = self._pending, None
        # 0 where the norm was infinite; the squares are then NaN whatever they are divided by.
        scale = min(1.0, args.max_grad_norm / (float(logs["grad_norm"]) + _CLIP_EPSILON)) or 1.0
        self._show(control, self._reader.record_gradients(squares, step, scale))

    # -----------------------------------------------------------------------------------------------------------

    def gradients(self, state: Any, control: Any, *, scale: float) -> None:
        """Called by BlockwiseTrainer when the gradients of a step are complete and not clipped yet."""
        if self._reader is not None:
            self._show(control, self._reader.gradients(state.global_step, scale=scale))

    def _measure(self, state: Any, control: Any) -> None:
        for monitor in self._monitors:
            try:
                report = monitor.step(state.global_step)
            except ValueError as error:
                if "not finite" not in str(error):
                    raise
                # What a diverged training does next is for the training to say.
                warnings.warn(f"step {state.global_step}: sharpness was not measured: {error}", stacklevel=2)
            else:
                self._show(control, report)

    def _show(self, control: Any, report: SharpnessReport | None) -> None:
        if self._log is None or report is None:
            return
        should_log = control.should_log
        self._log(
            {f"sharpness/{report.estimator}/{block.value}": found.mean for block, found in report.items()}
        )
        control.should_log = should_log  # Trainer takes any log for the one that it wanted of the loss

    def _batches_for(self, estimator: str) -> Any:
        return self._batches if estimator in ON_BATCHES else None
