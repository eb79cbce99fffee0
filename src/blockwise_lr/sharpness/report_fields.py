"""The fields of a SharpnessReport as values of JSON, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blockwise_lr.blocks import Block
from blockwise_lr.json_values import number, number_or_nan, numbers, typed
from blockwise_lr.sharpness.estimate import Estimate
from blockwise_lr.sharpness.histogram import Histogram

if TYPE_CHECKING:
    from blockwise_lr.sharpness.report import SharpnessReport

FORMAT = 1
_PLAIN = {"estimator": str, "method": str, "samples": int, "batches": int, "probes": int, "seed": int}


def to_values(report: SharpnessReport) -> dict[str, Any]:
    """Return the report as JSON-ready values. Numbers that are not finite become None."""
    return {
        "format": FORMAT,
        "estimator": report.estimator,
        "method": report.method,
        "step": report.step,
        "samples": report.samples,
        "batches": report.batches,
        "probes": report.probes,
        "seed": report.seed,
        "stderr_over": report.stderr_over,
        "blocks": {block.value: _to_json(e) for block, e in report.blocks.items()},
        "per_layer": {
            layer: {block.value: _to_json(e) for block, e in found.items()}
            for layer, found in report.per_layer.items()
        },
        "per_parameter": {name: _to_json(e) for name, e in report.per_parameter.items()},
        "weights": list(report.weights),
        "draws": {block.value: [_finite(x) for x in values] for block, values in report.draws.items()},
        "histograms": {block.value: h._asdict() for block, h in report.histograms.items()},
    }


def to_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the report from the values of :func:`to_values`.

    Raises:
        ValueError: the values are not a report, or are damaged.
    """
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        kind = content.get("format") if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"not a sharpness report: its format is {kind}; expected {FORMAT}")
    try:
        fields: dict[str, Any] = dict(
            blocks=_by_block(content["blocks"]),
            per_parameter={name: _from_json(e) for name, e in content["per_parameter"].items()},
            per_layer={layer: _by_block(found) for layer, found in content["per_layer"].items()},
            draws={
                Block(block): [number_or_nan(x) for x in typed(values, list)]
                for block, values in content["draws"].items()
            },
            histograms={Block(block): _histogram(**h) for block, h in content["histograms"].items()},
            weights=numbers(content["weights"]),
            step=None if content["step"] is None else typed(content["step"], int),
            stderr_over=None if content["stderr_over"] is None else typed(content["stderr_over"], str),
            **{name: typed(content[name], kind) for name, kind in _PLAIN.items()},
        )
        if not fields["blocks"]:
            raise ValueError("it has no blocks")
        if any(len(fields["draws"][block]) != len(fields["weights"]) for block in fields["blocks"]):
            raise ValueError(f"not as many draws of every block as weights, {len(fields['weights'])}")
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"not a sharpness report, or a damaged one: {error!r}") from None
    return fields


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _to_json(e: Estimate) -> list[float | int | None]:
    return [_finite(e.mean), _finite(e.stderr), e.numel]


def _from_json(values: Sequence[float | None]) -> Estimate:
    mean, stderr, numel = typed(values, list)
    return Estimate(number_or_nan(mean), number_or_nan(stderr), typed(numel, int))


def _histogram(start: Any, width: Any, counts: Any, zeros: Any) -> Histogram:
    whole = [typed(count, int) for count in typed(counts, list)]
    return Histogram(number(start), number(width), whole, typed(zeros, int))


def _by_block(found: Mapping[str, Sequence[float | None]]) -> dict[Block, Estimate]:
    return {Block(block): _from_json(e) for block, e in found.items()}
