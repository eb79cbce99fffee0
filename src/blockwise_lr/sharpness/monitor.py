"""SharpnessMonitor: the sharpness of every block while a model trains, in a loop of your own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

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
"""The estimators that cannot do without batches."""


class SharpnessMonitor:
    """Measures at chosen steps, always on the same held-out batches, and writes a line of sharpness.jsonl each time.

    The training stays as it is to the bit: parameters, gradients and random state are left as they were. Step n is
    the model after n optimizer steps; step 0 is before training.

    Under torch.distributed every process makes a monitor of the same arguments and calls it; the first one writes.

    Args:
        model: the model, wrapped in DDP or not.
        batches: held-out batches as :func:`blockwise_lr.measure_sharpness` takes them, kept in memory: a few. Give
            every process the same ones: each takes its share of the rows. Needed for "fisher" and "hutchinson".
        every: measure at each multiple of this many steps, 0 included. Default 0: only at `at`.
        at: steps to measure at besides.
        path: of the file; None: write none. What is there already is replaced.
        estimator: "fisher" (default) or "hutchinson": on the batches. "optimizer": off Adam's second moment.
            "empirical": on the batches if there are any, otherwise off the training's own gradients, by
            :meth:`gradients`, for free.
        seed: of the sampled labels and random signs. The same at every step, so that the steps can be compared.
        probes: draws a batch, for "fisher" and "hutchinson".
        tokens_per_step: predicted tokens (samples) in one optimizer step, over all processes and micro-batches; for
            windows of n tokens, n - 1 each. Needed where the training's gradients or Adam's are read.
        optimizer: the running optimizer, for "optimizer".
        loss_fn, hvp: as in :func:`blockwise_lr.measure_sharpness`.
        blocks: a BlockMap, where the model needs overrides. Default: ``classify(model)``.
        context: makes the context of a forward pass, such as ``lambda: torch.autocast("cuda", torch.bfloat16)``.
        resume_step: the step from which a training goes on: lines up to it are kept. Default 0: all are replaced.

    Raises:
        ValueError: an estimator without what it needs, a number out of range; and as :func:`blockwise_lr.classify`.
        TypeError: a batch that several processes cannot share, since it does not consist of tensors.

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
        # The training's gradients are those of the whole batch on every process already.
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
        """Whether it is :meth:`gradients` that measures, and not :meth:`step`."""
        return self.estimator == "empirical" and self._batches is None

    def due(self, step: int) -> bool:
        """Whether `step` is one to measure at."""
        if step == 0 and self.estimator == "optimizer":
            return False  # Adam has seen no gradient yet
        return step in self.at or (self.every > 0 and step % self.every == 0)

    def step(self, step: int) -> SharpnessReport | None:
        """Measure the model after `step` optimizer steps, if that is one to measure at.

        Returns:
            The report; None if nothing was measured.

        Raises:
            ValueError: as :func:`blockwise_lr.measure_sharpness`; or the monitor is one for :meth:`gradients`.
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
        """Measure from the gradients that are in ``.grad``, if `step` is one to measure at.

        To be called after ``backward()`` of the last micro-batch, before gradients are clipped, and before
        ``optimizer.step()``; under DDP they are then the mean over all processes.

        Args:
            step: optimizer steps taken so far: 0 at the first gradient of a training.
            scale: the gradients are this many times those of the mean loss, such as ``GradScaler.get_scale()``.

        Returns:
            The report; None if nothing was measured. It has no standard errors.

        Raises:
            ValueError: no parameter has a gradient; `scale` is not above 0; or the monitor is not one for gradients.
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

    def record_gradients(self, squares: Tensor, step: int, scale: float) -> SharpnessReport:
        """The same from :func:`blockwise_lr.sharpness.training_gradients.squared_gradients`, taken earlier."""
        samples = self.tokens_per_step or 0
        return self.record(gradient_report(self.parts, squares, samples=samples, scale=scale, step=step))

    def record(self, report: SharpnessReport) -> SharpnessReport:
        """Write a report's line, on the first process."""
        if self.path is not None:
            append_report(self.path, report)
        return report


def check_monitor(
    estimator: str, every: int, at: Collection[int], has_batches: bool, tokens_per_step: int | None
) -> None:
    """Whether the arguments of a monitor go together.

    Raises:
        ValueError: they do not; names the argument and says what was expected.
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
    """Whether a training that goes on from `resume_step` will not measure this again."""
    if report.step is None or resume_step == 0:
        return False
    # The gradient at the model of that step is computed by the step after it.
    return report.step < resume_step or (report.step == resume_step and report.method != METHOD)


def _shares(batches: Iterable[Any] | Mapping[str, Any], rank: int, world: int) -> list[Any]:
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed from the global state
        whole = [batches] if isinstance(batches, Mapping) else list(batches)
    if not whole:
        raise ValueError("batches is empty; expected at least one batch")
    return whole if world == 1 else [_share(batch, rank, world) for batch in whole]


def _share(value: Any, rank: int, world: int) -> Any:
    """This process's rows of a batch."""
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
    if value is None or isinstance(value, bool):  # a flag beside the tensors
        return value
    raise TypeError(
        f"a batch holds a {type(value).__name__}, which {world} processes cannot share by rows: "
        "give batches of tensors, in mappings or pairs"
    )
