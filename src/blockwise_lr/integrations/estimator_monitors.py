"""One SharpnessMonitor per estimator, for the callbacks of trainers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from blockwise_lr.blocks import BlockMap
from blockwise_lr.sharpness.estimators import HessianProducts
from blockwise_lr.sharpness.measure import Estimator
from blockwise_lr.sharpness.monitor import ON_BATCHES, SharpnessMonitor, check_monitor
from blockwise_lr.sharpness.predictions import LossFunction
from blockwise_lr.sharpness.report import SharpnessReport


class EstimatorMonitors:
    """Settings of a callback's measurements; during a run, also a :class:`SharpnessMonitor` for each estimator.

    Args:
        batches: held-out batches. They are read at once, without changing the global random state.
        every, at, estimators, tokens_per_step, seed, probes, loss_fn, hvp, blocks: as in the callbacks.

    Raises:
        ValueError: an estimator is given twice, or lacks an argument that it needs.
    """

    def __init__(
        self,
        batches: Iterable[Any] | Mapping[str, Any] | None,
        *,
        every: int,
        at: Iterable[int],
        estimators: Estimator | Sequence[Estimator],
        tokens_per_step: int | None,
        seed: int,
        probes: int,
        loss_fn: LossFunction | None,
        hvp: HessianProducts,
        blocks: BlockMap | None,
    ) -> None:
        self.estimators = (estimators,) if isinstance(estimators, str) else tuple(estimators)
        if not self.estimators or len(set(self.estimators)) < len(self.estimators):
            raise ValueError(f"estimators are {list(self.estimators)}; expected one or more, each once")
        if batches is not None and not isinstance(batches, Mapping):
            with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed from the global state
                batches = list(batches)
        self.batches = batches
        at = tuple(at)
        for estimator in self.estimators:
            has_batches = batches is not None and estimator in ON_BATCHES
            check_monitor(estimator, every, at, has_batches, tokens_per_step)
        self._settings: dict[str, Any] = {
            "every": every, "at": at, "seed": seed, "probes": probes, "hvp": hvp, "blocks": blocks,
            "loss_fn": loss_fn, "tokens_per_step": tokens_per_step,
        }  # fmt: skip
        self._on_batches: list[SharpnessMonitor] = []
        self.on_gradients: SharpnessMonitor | None = None
        """The monitor that reads the gradients of the training; None outside a run, and without "empirical"."""

    def start(
        self,
        model: nn.Module,
        *,
        path: Path,
        optimizer: Optimizer | None,
        resume_step: int,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        **changes: Any,
    ) -> None:
        """Create the monitors at the start of a run.

        Args:
            model, path, optimizer, resume_step, context: as in :class:`SharpnessMonitor`.
            changes: settings of the constructor to replace for this run, `batches` among them.
        """
        self.stop()
        settings = {**self._settings, "batches": self.batches, **changes}
        batches = settings.pop("batches")
        for estimator in self.estimators:
            monitor = SharpnessMonitor(
                model,
                batches if estimator in ON_BATCHES else None,
                estimator=estimator,
                path=path,
                optimizer=optimizer,
                context=context,
                resume_step=resume_step,
                **settings,
            )
            if monitor.reads_gradients:
                self.on_gradients = monitor
            else:
                self._on_batches.append(monitor)

    def stop(self) -> None:
        """Release the model and the optimizer."""
        self._on_batches, self.on_gradients = [], None

    def step(self, step: int) -> list[SharpnessReport]:
        """Return the reports of the estimators that measure the model after `step` optimizer steps.

        If the loss is not finite, there is a warning in place of the report. Whether such a run stops is the
        trainer's decision, and a measurement must not end it.
        """
        reports = []
        for monitor in self._on_batches:
            try:
                report = monitor.step(step)
            except ValueError as error:
                if "not finite" not in str(error):
                    raise
                warnings.warn(f"step {step}: sharpness was not measured: {error}", stacklevel=3)
            else:
                reports += [] if report is None else [report]
        return reports


def sharpness_scalars(report: SharpnessReport) -> dict[str, float]:
    """Return the entries of a log for one measurement, ``sharpness/<estimator>/<block>``."""
    return {f"sharpness/{report.estimator}/{block.value}": found.mean for block, found in report.items()}
