"""SharpnessMonitor: measure the sharpness of every block while a model trains in the user's own loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from blockwise_lr.blocks import BlockMap, classify
from blockwise_lr.sharpness.estimators import ESTIMATORS, HessianProducts
from blockwise_lr.sharpness.measure import Estimator, measure_sharpness
from blockwise_lr.sharpness.parameter_parts import ParameterParts
from blockwise_lr.sharpness.predictions import LossFunction
from blockwise_lr.sharpness.records import append_report, keep_reports, read_reports
from blockwise_lr.sharpness.report import SharpnessReport
from blockwise_lr.sharpness.training_gradients import METHOD, gradient_report, squared_gradients

__all__ = ["SharpnessMonitor", "read_reports"]


ON_BATCHES = frozenset({"fisher", "hutchinson"})
"""The estimators that need batches."""


class SharpnessMonitor:
    """Measure the sharpness at chosen steps, on fixed held-out batches, and append each report to sharpness.jsonl.

    The training is unchanged to the bit, because parameters, gradients and random state are restored. Step n is the
    model after n optimizer steps; step 0 is before training.

    Under torch.distributed, every process creates a monitor with the same arguments and calls it. The first process
    writes the file.

    Args:
        model: the model, wrapped in DDP or not.
        batches: a few held-out batches as for :func:`blockwise_lr.measure_sharpness`. They are kept in memory. Give
            every process the same batches: each takes its share of the rows. Required for "fisher" and "hutchinson".
        every: measure at each multiple of this many steps, including 0. Default 0: only at the steps of `at`.
        at: further steps to measure at. Default: none.
        path: the file to write; None: write no file. An existing file is replaced. Default: "sharpness.jsonl".
        estimator: "fisher" (default) and "hutchinson" measure on the batches. "optimizer" reads Adam's second moment.
            "empirical" measures on the batches if there are any. Otherwise it reads the gradients of the training
            itself, at no cost, by :meth:`gradients`.
        seed: seed of the sampled labels and random signs. It is the same at every step, so that steps are comparable.
        probes: number of draws per batch, for "fisher" and "hutchinson". Default: 1.
        tokens_per_step: number of predicted tokens (samples) in one optimizer step, over all processes and
            micro-batches. A window of n tokens has n - 1 of them. Required if the gradients of the training or Adam's
            moments are read.
        optimizer: the optimizer that trains the model, for "optimizer".
        loss_fn, hvp: as in :func:`blockwise_lr.measure_sharpness`.
        blocks: a BlockMap, if the model needs overrides. Default: ``classify(model)``.
        context: returns the context manager for a forward pass, such as
            ``lambda: torch.autocast("cuda", torch.bfloat16)``.
        resume_step: the step from which the training resumes. Earlier reports in the file are kept. Default 0: the
            file is replaced.

    Raises:
        ValueError: the estimator lacks an argument that it needs, or a number is out of range. Also the errors of
            :func:`blockwise_lr.classify`.
        TypeError: a batch contains something other than tensors, so several processes cannot share it.

    Example:
        >>> monitor = SharpnessMonitor(model, batches, every=100, path="run/sharpness.jsonl")  # doctest: +SKIP
        >>> for step in range(1, steps + 1):  # doctest: +SKIP
        ...     train_one_step()
        ...     monitor.step(step)
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] | Mapping[str, Any] | None = None,
        *,
        every: int = 0,
        at: Iterable[int] = (),
        path: str | Path | None = "sharpness.jsonl",
        estimator: Estimator = "fisher",
        seed: int = 0,
        probes: int = 1,
        tokens_per_step: int | None = None,
        optimizer: Optimizer | None = None,
        loss_fn: LossFunction | None = None,
        hvp: HessianProducts = "auto",
        blocks: BlockMap | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        resume_step: int = 0,
    ) -> None:
        self.estimator = estimator
        self.every, self.at = every, frozenset(at)
        check_monitor(estimator, every, self.at, batches is not None, tokens_per_step)
        if estimator == "optimizer" and optimizer is None:
            raise ValueError('estimator="optimizer" needs optimizer=..., the one that trains the model')
        blocks = classify(model) if blocks is None else blocks
        # Gradients read during training are already means over all processes.
        self.parts = ParameterParts(model, blocks, distributed=False)
        self.tokens_per_step = tokens_per_step
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.path = Path(path) if path is not None and rank == 0 else None
        self._model = model
        self._context = context
        self._batches = None if batches is None else _shares(batches, rank, world)
        self._settings: dict[str, Any] = {
            "estimator": estimator, "seed": seed, "loss_fn": loss_fn, "blocks": blocks, "distributed": world > 1,
        }  # fmt: skip
        if estimator == "optimizer":
            self._settings |= {"optimizer": optimizer, "samples": tokens_per_step}
        elif estimator in ON_BATCHES:
            self._settings |= {"probes": probes} | ({"hvp": hvp} if estimator == "hutchinson" else {})
        if self.path is not None:
            keep_reports(self.path, lambda report: _is_before(report, resume_step))

    @property
    def reads_gradients(self) -> bool:
        """Whether the monitor measures in :meth:`gradients` instead of :meth:`step`."""
        return self.estimator == "empirical" and self._batches is None

    def due(self, step: int) -> bool:
        """Return whether the monitor measures at `step`."""
        if step == 0 and self.estimator == "optimizer":
            return False  # Adam has no moments before the first step
        return step in self.at or (self.every > 0 and step % self.every == 0)

    def step(self, step: int) -> SharpnessReport | None:
        """Measure the model after `step` optimizer steps, if the monitor measures at this step.

        Returns:
            The report; None if nothing was measured.

        Raises:
            ValueError: the monitor reads gradients (:meth:`gradients`); and the errors of
                :func:`blockwise_lr.measure_sharpness`.
        """
        if self.reads_gradients:
            raise ValueError(
                'estimator="empirical" without batches reads the gradients of training: call gradients(step) '
                "between backward() and clipping, or give batches"
            )
        if not self.due(step):
            return None
        with self._context():
            return self.record(measure_sharpness(self._model, self._batches, step=step, **self._settings))

    def gradients(self, step: int, *, scale: float = 1.0) -> SharpnessReport | None:
        """Measure from the gradients in ``.grad``, if the monitor measures at `step`.

        Call it after ``backward()`` of the last micro-batch, before gradient clipping and before
        ``optimizer.step()``. Under DDP the gradients are then the mean over all processes.

        Args:
            step: number of optimizer steps taken so far: 0 at the first gradient of a run.
            scale: the factor between these gradients and those of the mean loss, such as ``GradScaler.get_scale()``.
                Default: 1.

        Returns:
            The report, without standard errors; None if nothing was measured.

        Raises:
            ValueError: no parameter has a gradient; `scale` is not above 0; or the monitor does not read gradients.
        """
        if not self.reads_gradients or self.tokens_per_step is None:
            raise ValueError(
                f'gradients(step) is for estimator="empirical" without batches; this monitor has '
                f'estimator="{self.estimator}"{"" if self._batches is None else " and batches"}: call step(step)'
            )
        if not scale > 0:
            raise ValueError(f"scale is {scale}; expected a number above 0")
        if not self.due(step):
            return None
        return self.record_gradients(squared_gradients(self.parts), step, scale)

    def record_gradients(self, squares: npt.NDArray[np.float64], step: int, scale: float) -> SharpnessReport:
        """Write and return the report of gradients that were squared earlier.

        Args:
            squares: from :func:`blockwise_lr.sharpness.training_gradients.squared_gradients`.
            step, scale: as in :meth:`gradients`.
        """
        samples = self.tokens_per_step or 0
        return self.record(gradient_report(self.parts, squares, samples=samples, scale=scale, step=step))

    def record(self, report: SharpnessReport) -> SharpnessReport:
        """Append a report to the file, on the first process, and return it."""
        if self.path is not None:
            append_report(self.path, report)
        return report


def check_monitor(
    estimator: str, every: int, at: Collection[int], has_batches: bool, tokens_per_step: int | None
) -> None:
    """Check that the arguments of a monitor fit together.

    Raises:
        ValueError: they do not. The message names the argument and what was expected.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}; expected one of {', '.join(ESTIMATORS)}")
    if every < 0 or any(step < 0 for step in at):
        raise ValueError(f"steps to measure at are every {every}, at {sorted(at)}; expected 0 or more")
    if every == 0 and not at:
        raise ValueError("no step to measure at: give every=..., at=..., or both")
    if estimator in ON_BATCHES and not has_batches:
        raise ValueError(f'estimator="{estimator}" needs batches: a few held-out ones')
    reads_training = estimator == "optimizer" or (estimator == "empirical" and not has_batches)
    if reads_training and (tokens_per_step is None or tokens_per_step < 1):
        raise ValueError(
            f'estimator="{estimator}" needs tokens_per_step=..., the predicted tokens in one optimizer step over all '
            f"processes: sequences * (length - 1) for a causal language model (given: {tokens_per_step})"
        )


def _is_before(report: SharpnessReport, resume_step: int) -> bool:
    """Return whether a training that resumes from `resume_step` will not repeat this report."""
    if report.step is None or resume_step == 0:
        return False
    # The first step after resuming recomputes the gradient of the model at `resume_step`.
    return report.step < resume_step or (report.step == resume_step and report.method != METHOD)


def _shares(batches: Iterable[Any] | Mapping[str, Any], rank: int, world: int) -> list[Any]:
    """Return this process's share of every batch."""
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed from the global random state
        whole = [batches] if isinstance(batches, Mapping) else list(batches)
    if not whole:
        raise ValueError("batches is empty; expected at least one batch")
    return whole if world == 1 else [_share(batch, rank, world) for batch in whole]


def _share(value: Any, rank: int, world: int) -> Any:
    """Return this process's rows of a batch."""
    if isinstance(value, Tensor) and value.ndim > 0:
        if len(value) < world:
            raise ValueError(
                f"a batch of {len(value)} rows cannot be shared by {world} processes: give larger batches"
            )
        return value.tensor_split(world)[rank]
    if isinstance(value, Mapping):
        return {name: _share(each, rank, world) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_share(each, rank, world) for each in value)
    if value is None or isinstance(value, bool):  # a flag, equal for all rows
        return value
    raise TypeError(
        f"a batch holds a {type(value).__name__}, which {world} processes cannot share by rows: "
        "give batches of tensors, in mappings or pairs"
    )
