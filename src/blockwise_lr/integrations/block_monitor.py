"""A Lightning callback that logs the sharpness, the learning rate and the ratio of every block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from blockwise_lr.extras import missing

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback  # type: ignore[assignment]  # another class of the same name
    except ModuleNotFoundError:
        raise missing("blockwise_lr.integrations.lightning needs", "lightning", "lightning") from None

from blockwise_lr.blocks import BlockMap
from blockwise_lr.integrations.estimator_monitors import EstimatorMonitors, sharpness_scalars
from blockwise_lr.sharpness.estimators import HessianProducts
from blockwise_lr.sharpness.measure import Estimator
from blockwise_lr.sharpness.predictions import LossFunction
from blockwise_lr.sharpness.report import SharpnessReport


class BlockMonitor(Callback):
    """Log the learning rate, the ratio and, at chosen steps, the sharpness of every block to Lightning's loggers.

    The learning rates are logged as ``lr/<block>`` and the ratios as ``ratio/<block>``, every ``log_every_n_steps``
    steps, with the step of the loss. They are those that the step uses.

    With `every` or `at`, the callback also measures sharpness. Each measurement uses the same held-out batches, appends
    one line to sharpness.jsonl and is logged as ``sharpness/<estimator>/<block>``. It leaves the training unchanged, to
    the bit. Step n is the model after n optimizer steps, and step 0 is the model before training.

    Forward passes use the precision of the trainer, such as bf16 under ``precision="bf16-mixed"``. Under DDP, each
    process measures its share of every batch.

    Args:
        batches: a few held-out batches, or a DataLoader of them. They are read once, when the callback is created, and
            those of the first process are used. A batch is a mapping with labels or a pair (inputs, labels); with
            `loss_fn`, it is what that takes. "empirical" and "optimizer" need none.
        every: measure at each multiple of this many optimizer steps, including step 0. Default 0: only at the steps in
            `at`.
        at: further steps to measure at. Default: none.
        estimators: one or several. "fisher" (default) and "hutchinson" measure on the batches. "empirical" reads the
            unclipped gradient of the training step that starts at that step, so it cannot measure the last step.
            "optimizer" reads Adam's second moment, so it cannot measure step 0.
        tokens_per_step: number of predicted tokens (samples) in one optimizer step, over all processes and
            micro-batches. "empirical" and "optimizer" need it.
        path: the file to write. When a run resumes from a checkpoint, the file keeps the lines before that checkpoint.
            Default: sharpness.jsonl in ``trainer.log_dir``, which is a new folder for each run.
        seed, probes, hvp, blocks: as in :func:`blockwise_lr.measure_sharpness`.
        loss_fn: ``loss_fn(module, batch)``, which gets the LightningModule and computes one cross-entropy or returns
            ``(logits, labels)``. Default: call the LightningModule if it has a ``forward``, and otherwise its only
            submodule with parameters.

    Raises:
        ValueError: an estimator is given twice, or lacks an argument that it needs. When training starts, also if the
            model to call is not known, or the strategy flattens the parameters. Also the errors of
            :func:`blockwise_lr.classify` and :func:`blockwise_lr.measure_sharpness`. If the loss is not finite, the
            measurement is skipped with a warning.

    Example:
        >>> callback = BlockMonitor(batches, every=100)  # doctest: +SKIP
        >>> Trainer(max_steps=1000, callbacks=[callback]).fit(module, loader)  # doctest: +SKIP
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
    ) -> None:
        at = tuple(at)
        self._monitors: EstimatorMonitors | None = None
        if every or at or batches is not None:
            self._monitors = EstimatorMonitors(
                batches, every=every, at=at, estimators=estimators, tokens_per_step=tokens_per_step, seed=seed,
                probes=probes, loss_fn=loss_fn, hvp=hvp, blocks=blocks,
            )  # fmt: skip
        self._loss_fn = loss_fn
        self._path = path
        self._last_step = 0  # the optimizer step at which _measure ran last

    # Lightning's events
    # -----------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._last_step = trainer.global_step
        if self._monitors is None:
            return
        check_strategy(trainer.strategy)
        self._monitors.start(
            pl_module if self._loss_fn is not None else called_module(pl_module),
            path=Path(self._path or Path(trainer.log_dir or trainer.default_root_dir) / "sharpness.jsonl"),
            optimizer=self._optimizer(trainer),
            resume_step=trainer.global_step,
            context=trainer.precision_plugin.forward_context,
            batches=_on_device(self._monitors.batches, trainer, pl_module),
        )
        if trainer.global_step == 0:
            self._measure(trainer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        step = trainer.global_step
        if (step + 1) % trainer.log_every_n_steps == 0:
            _log(trainer, _rates_and_ratios(optimizer), step)
        if self._monitors is not None and (monitor := self._monitors.on_gradients) is not None:
            # Lightning has undone the loss scale of fp16 here, and has not clipped yet.
            self._log_report(trainer, monitor.gradients(step))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Under gradient accumulation, most batches end without an optimizer step.
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._measure(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._release()

    # -----------------------------------------------------------------------------------------------------------

    def _measure(self, trainer: Any) -> None:
        if self._monitors is not None:
            for report in self._monitors.step(trainer.global_step):
                self._log_report(trainer, report)

    def _log_report(self, trainer: Any, report: SharpnessReport | None) -> None:
        if report is not None:
            _log(trainer, sharpness_scalars(report), trainer.global_step)

    def _optimizer(self, trainer: Any) -> Optimizer | None:
        """Return the optimizer that "optimizer" reads; None if no estimator reads one."""
        if self._monitors is None or "optimizer" not in self._monitors.estimators:
            return None
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f'estimators contains "optimizer", which reads one optimizer, and this module has '
                f"{len(trainer.optimizers)}: leave it out of the estimators"
            )
        found: Optimizer = trainer.optimizers[0]
        return found

    def _release(self) -> None:
        if self._monitors is not None:
            self._monitors.stop()


def check_strategy(strategy: Any) -> None:
    """Check that a strategy of Lightning leaves the model's parameters as they are.

    Raises:
        ValueError: the strategy flattens or hides them.
    """
    kinds = {kind.__name__ for kind in type(strategy).__mro__}
    hidden = sorted(kinds & {"FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"})
    if hidden:
        raise ValueError(
            f"{hidden[0]} replaces the parameters by flattened ones, so their blocks cannot be told apart: use "
            'strategy="ddp" or ModelParallelStrategy (fully_shard)'
        )


def called_module(module: nn.Module) -> nn.Module:
    """Return the module to call on a batch: a LightningModule with a ``forward``, or its only submodule.

    Raises:
        ValueError: the LightningModule has no ``forward``, and several of its submodules have parameters.
    """
    if not type(module).forward.__qualname__.startswith(("LightningModule.", "_forward_unimplemented")):
        return module
    total = {id(parameter) for parameter in module.parameters()}
    children = [
        child for child in module.children() if {id(parameter) for parameter in child.parameters()} == total
    ]
    if len(children) != 1:
        raise ValueError(
            f"{type(module).__name__} has no forward and no single submodule with all of its parameters, so it is not "
            "known what to call on a batch: define forward, or give BlockMonitor(..., loss_fn=...)"
        )
    return children[0]


def _on_device(batches: Any, trainer: Any, module: Any) -> Any:
    """Return the batches of the first process, in the trainer's precision and on the module's device."""
    if batches is None:
        return None
    batches = trainer.strategy.broadcast([batches] if isinstance(batches, Mapping) else batches)
    with torch.random.fork_rng(devices=[]):  # a hook of the user may draw random numbers
        return [
            module.transfer_batch_to_device(trainer.precision_plugin.convert_input(batch), module.device, 0)
            for batch in batches
        ]


def _rates_and_ratios(optimizer: Any) -> dict[str, float]:
    """Return the entries of a log for the groups of an optimizer; the groups of one block have one learning rate."""
    groups = [group for group in optimizer.param_groups if "block" in group]
    rates = {f"lr/{group['block']}": float(group["lr"]) for group in groups}
    return rates | {f"ratio/{group['block']}": float(group["lr_ratio"]) for group in groups}


def _log(trainer: Any, scalars: dict[str, float], step: int) -> None:
    if scalars:
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)
