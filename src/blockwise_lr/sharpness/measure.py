"""Measure the average sharpness of every block on batches, with standard errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from blockwise_lr import distributed as processes
from blockwise_lr.arguments import check_model
from blockwise_lr.blocks import BlockMap
from blockwise_lr.estimator_names import Estimator as Estimator
from blockwise_lr.sharpness import estimators
from blockwise_lr.sharpness.draws import Draws, traces_on_host
from blockwise_lr.sharpness.estimators import HessianProducts, MeasuredModel
from blockwise_lr.sharpness.histogram import Histograms
from blockwise_lr.sharpness.measured_batches import accumulated
from blockwise_lr.sharpness.measured_batches import in_lockstep as in_lockstep
from blockwise_lr.sharpness.measurement_mode import measurement_mode as measurement_mode
from blockwise_lr.sharpness.measurement_mode import unwrapped as unwrapped
from blockwise_lr.sharpness.parameter_parts import ParameterParts
from blockwise_lr.sharpness.predictions import LossFunction
from blockwise_lr.sharpness.report import SharpnessReport

_MEANINGS = {
    "fisher": "Gauss-Newton trace, labels sampled from the model's softmax",
    "empirical": "squared gradient of the data's labels",
    "hutchinson": "trace of the Hessian",
    "optimizer": "Adam's second moment",
}


def measure_sharpness(
    model: nn.Module,
    batches: Iterable[Any] | Mapping[str, Any] | None = None,
    *,
    estimator: Estimator = "fisher",
    seed: int = 0,
    probes: int = 1,
    accumulate: int = 1,
    max_batches: int | None = None,
    loss_fn: LossFunction | None = None,
    blocks: BlockMap | None = None,
    distributed: bool = False,
    histogram: bool = False,
    hvp: HessianProducts = "auto",
    optimizer: Optimizer | None = None,
    samples: int | None = None,
    step: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> SharpnessReport:
    r"""Measure the average sharpness of every block, S(b) = tr(H_b) / #(b), with its standard error.

    This is the paper's average sharpness (arXiv 2502.19002, section 3). The model is measured in eval mode. Its
    parameters, buffers, gradients and modes, and the global random state, are unchanged afterwards. The passes run in
    the model's dtype and under the caller's autocast; sums are in float64. Fused QKV weights need not be split: their
    parts are measured separately. Gradient checkpointing of transformers' layers stays on. A single process waits for a
    GPU once, at the end. With ``accumulate=1`` it keeps a sixteenth of the gradients at a time, or the largest one, for
    "fisher" and "empirical".

    Args:
        model: a model whose loss is a cross-entropy: a causal or masked language model, or a classifier. If it is
            wrapped in DDP or sharded by ``fully_shard``, S is that of the global batch. Every process calls this
            function with its share of the batch: the same number of batches, of any sizes. Under tensor parallelism (a
            ``tp_plan`` of transformers), every process calls it with the same batches.
        batches: an iterable of batches, or one mapping. A batch is a mapping for ``model(**batch)`` that contains
            labels, or a pair (inputs, labels). Rows with label -100 do not count. "optimizer" needs no batches.
        estimator: "fisher" (default), "empirical", "hutchinson" (true Hessian) or "optimizer". What each estimates, and
            its bias, is in :mod:`blockwise_lr.sharpness.estimators`.
        seed: seed of the sampled labels and random signs. Nothing else is random. Default: 0.
        probes: number of draws per batch, for "fisher" and "hutchinson". Default: 1.
        accumulate: number of consecutive batches that count as one: their gradients are added before they are
            squared. An incomplete group at the end is not measured. Default: 1.
        max_batches: largest number of (accumulated) batches. Default: all.
        loss_fn: ``loss_fn(model, batch)``, for a model that does not compute its loss. It computes one
            cross-entropy, or returns ``(logits, labels)`` with the classes in the last dimension. Tokens that a mask
            leaves out of its loss do not count. It gets the model without its DDP and torch.compile wrappers.
        blocks: a BlockMap, to use overrides or to classify only once. Default: ``classify(model)``.
        distributed: whether the model is a replica on every process although it is not wrapped in DDP. Default: False.
        histogram: also count the elements of each block by their own sharpness. This needs one float32 per element,
            and is not available for "hutchinson". Default: False.
        hvp: how "hutchinson" computes Hessian-vector products: "auto" (default), "double-backward" or
            "finite-differences".
        optimizer: for "optimizer": the Adam-like optimizer that trains the model.
        samples: for "optimizer": the number of predicted tokens (samples) in one optimizer step.
        step: the training step, for the report. Default: none.
        on_batch: called with the number of finished batches, for progress. Default: none.

    Returns:
        SharpnessReport. Standard errors are over batches. With one batch they are over its probes, and then do not
        cover the variation of the data. With one batch and one probe they are NaN.

    Raises:
        ValueError: an unknown estimator; a number out of range; nothing to measure; an argument that the estimator
            does not take; processes with different numbers of batches; or a model that is sharded, but neither by
            ``fully_shard`` nor by tensor parallelism over all processes. Also the errors of
            :func:`blockwise_lr.classify` and :func:`blockwise_lr.sharpness.predictions.predict`.

    Example:
        >>> report = measure_sharpness(model, [{"input_ids": ids, "labels": ids}])  # doctest: +SKIP
        >>> report[Block.NORM].mean, report[Block.NORM].stderr  # doctest: +SKIP
        (0.0012, nan)
    """
    check_model(model, "measure_sharpness")
    _check(estimator, seed, probes, accumulate, max_batches, batches, hvp, optimizer, samples, histogram)
    inner, replicated = unwrapped(model)
    processes.reshard(inner)
    torch.clear_autocast_cache()  # the caller's autocast may have cast weights before they were last changed
    parts = ParameterParts(inner, blocks, distributed=distributed or replicated)
    measured = MeasuredModel(inner, parts, loss_fn)
    histograms = Histograms(parts) if histogram else None
    method = _MEANINGS[estimator]
    draws: list[Draws] = []
    if estimator == "optimizer":
        if optimizer is not None and samples is not None:  # always true after _check
            draws.append(estimators.optimizer(parts, optimizer, samples, keep_gradients=histogram))
    else:
        with measurement_mode(inner):
            for index, batch in enumerate(in_lockstep(accumulated(batches, accumulate, max_batches), parts)):
                batch_draws, products = _draw(
                    measured, estimator, batch, [seed, index], probes, hvp, histogram
                )
                method = f"{_MEANINGS[estimator]} ({products})" if products else method
                if histograms is not None:
                    histograms.add(batch_draws)
                draws.append(replace(batch_draws, gradients=None))
                del batch_draws  # and its gradients, before those of the next batch
                if on_batch is not None:
                    on_batch(index + 1)
        if not draws:
            raise ValueError("batches is empty; expected at least one batch")
    if histograms is not None and estimator == "optimizer":
        histograms.add(draws[0])
    traces, counts = traces_on_host(draws, may_be_empty=parts.distributed)
    return SharpnessReport.from_draws(
        parts.parts,
        traces,
        counts,
        estimator=estimator,
        method=method,
        seed=seed,
        step=step,
        histograms=histograms.counts() if histograms is not None else None,
    )


def _draw(
    measured: MeasuredModel,
    estimator: Estimator,
    batch: Sequence[Any],
    seed: Sequence[int],
    probes: int,
    hvp: HessianProducts,
    keep_gradients: bool,
) -> tuple[Draws, str]:
    """Return the draws from one batch, and the kind of Hessian-vector products ("" if the estimator has none)."""
    with torch.inference_mode(False), torch.enable_grad():
        if estimator == "fisher":
            draws = estimators.fisher(
                measured, batch, seed=seed, probes=probes, keep_gradients=keep_gradients
            )
            return draws, ""
        if estimator == "empirical":
            return estimators.empirical(measured, batch, keep_gradients=keep_gradients), ""
        return estimators.hutchinson(measured, batch, seed=seed, probes=probes, products=hvp)


def _check(
    estimator: str,
    seed: int,
    probes: int,
    accumulate: int,
    max_batches: int | None,
    batches: object,
    hvp: str,
    optimizer: Optimizer | None,
    samples: int | None,
    histogram: bool,
) -> None:
    """Raise ValueError unless the arguments of measure_sharpness are valid and fit together."""
    if estimator not in _MEANINGS:
        raise ValueError(f"estimator is {estimator!r}; expected one of {', '.join(_MEANINGS)}")
    for name, value in (("probes", probes), ("accumulate", accumulate), ("max_batches", max_batches)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected 1 or more")
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected 0 or more")
    if hvp not in get_args(HessianProducts):
        raise ValueError(f"hvp is {hvp!r}; expected one of {', '.join(get_args(HessianProducts))}")
    if hvp != "auto" and estimator != "hutchinson":
        raise ValueError(f'hvp is {hvp!r}, but estimator="{estimator}" has no Hessian-vector products')
    if estimator == "optimizer":
        if optimizer is None or samples is None or samples < 1:
            raise ValueError(
                'estimator="optimizer" needs optimizer=... and samples=..., the predicted tokens in one optimizer '
                f"step's batch (given: optimizer {type(optimizer).__name__}, samples {samples})"
            )
    elif batches is None:
        raise ValueError(f'estimator="{estimator}" needs batches')
    elif optimizer is not None or samples is not None:
        raise ValueError(f'optimizer and samples are for estimator="optimizer", not for "{estimator}"')
    if probes > 1 and estimator in ("empirical", "optimizer"):
        raise ValueError(f'probes is {probes}, but nothing is drawn at random with estimator="{estimator}"')
    if histogram and estimator == "hutchinson":
        raise ValueError('histogram=True is for squared gradients; estimator="hutchinson" has none')
