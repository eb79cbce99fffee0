"""A DirectionalReport as values for JSON, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blockwise_lr.blocks import Block
from blockwise_lr.directional.slope import Slope
from blockwise_lr.json_values import number_or_nan, numbers, typed

if TYPE_CHECKING:
    from blockwise_lr.directional.directional_report import DirectionalReport

FORMAT = 1
KIND = "directional"


def report_values(report: DirectionalReport) -> dict[str, Any]:
    """Return a report as values for JSON. Non-finite numbers become null."""
    return {
        "format": FORMAT,
        "kind": KIND,
        "step": report.step,
        "samples": report.samples,
        "batches": report.batches,
        "blocks": {
            block.value: {k: v if math.isfinite(v) else None for k, v in slope._asdict().items()}
            for block, slope in report.blocks.items()
        },
        "matrix": [list(row) for row in report.matrix],
        "eigenvalues": report.eigenvalues,
        "joint_best_lr": {block.value: lr for block, lr in report.joint_best_lr.items()},
        "hessian": None if report.hessian is None else [list(row) for row in report.hessian],
    }


def read_values(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the report that :func:`report_values` wrote.

    Raises:
        ValueError: `content` is not such a report.
    """
    if not isinstance(content, Mapping) or (content.get("kind"), content.get("format")) != (KIND, FORMAT):
        raise ValueError(f'not a directional report; expected "kind": "{KIND}" and "format": {FORMAT}')
    try:
        blocks = {Block(block): _slope(**slope) for block, slope in content["blocks"].items()}
        hessian = content["hessian"]
        return {
            "blocks": blocks,
            "matrix": _square(content["matrix"], len(blocks)),
            "hessian": None if hessian is None else _square(hessian, len(blocks)),
            "samples": typed(content["samples"], int),
            "batches": typed(content["batches"], int),
            "step": None if content["step"] is None else typed(content["step"], int),
        }
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"not a directional report, or a damaged one: {error!r}") from None


def _slope(numel: Any, **values: Any) -> Slope:
    if "best_lr_beside" not in values:
        raise ValueError(
            "it has no best_lr_beside, because an earlier version measured after the update: measure again"
        )
    return Slope(numel=typed(numel, int), **{name: number_or_nan(value) for name, value in values.items()})


def _square(rows: Any, size: int) -> list[list[float]]:
    found = [numbers(row) for row in typed(rows, list)]
    if not size or [len(row) for row in found] != [size] * size:
        raise ValueError(f"expected a matrix of {size} rows of {size} numbers, for at least one block")
    return found
