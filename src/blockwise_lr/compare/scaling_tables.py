"""The tables in the report of a fit over sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockwise_lr.compare.scaling_wording import (
    format_count,
    format_factor,
    format_number,
    format_range,
)
from blockwise_lr.compare.tables import Table
from blockwise_lr.compare.wording import format_interval, format_loss, format_signed, format_speedup


def scaling_tables(content: Mapping[str, Any]) -> dict[str, Table]:
    """Return the tables of the report: "fits", "comparisons" and "sizes"."""
    return {
        "fits": _fits_table(content),
        "comparisons": _comparisons_table(content),
        "sizes": _sizes_table(content),
    }


def _fits_table(content: Mapping[str, Any]) -> Table:
    rows = []
    for arm, fit in content["fits"].items():
        row = [arm]
        for name in ("E", "A", "alpha"):
            row += [format_number(fit[name]["value"]), format_range(fit[name]["ci95"])]
        rows.append([*row, f"{fit['rms']:.4f}"])
    noise = content["noise"]
    degrees = f"{noise['degrees']} degree{'s' * (noise['degrees'] > 1)} of freedom"
    source = "the spread between seeds, pooled over sizes" if noise["source"] == "seeds" else "the residuals"
    return Table(
        "L(N) = E + A N^-alpha",
        ["arm", "E", "95 % CI", "A", "95 % CI", "alpha", "95 % CI", "residual"],
        rows,
        note=f"L: terminal validation loss in nats per token. N: number of {_counted(content)}. E and A are at "
        f"least 0. Intervals: {content['draws']:,} draws of a bootstrap with noise from {source} ({degrees}). "
        "Residual: root mean square of what the law leaves, in nats.",
    )


def _counted(content: Mapping[str, Any]) -> str:
    return "parameters" + ("" if content["parameters"] == "all" else " outside embeddings and output head")


def _column(content: Mapping[str, Any]) -> str:
    return "parameters" if content["parameters"] == "all" else "parameters outside embeddings"


def _comparisons_table(content: Mapping[str, Any]) -> Table:
    rows = []
    for comparison in content["comparisons"]:
        for size in comparison["sizes"]:
            gap, factor = size["loss_gap"], size["factor"]
            between = {"value": factor["interpolated"], "bound": factor["bound"]}
            rows.append([
                comparison["arm"], f"{size['parameters']:,}",
                format_signed(gap["mean"]), format_interval(gap["ci95"], signed=True),
                format_factor(factor["value"]) + (" *" if factor["outside"] else ""),
                " to ".join(format_factor(end) for end in factor["ci95"]),
                "–" if between["value"] is None else format_speedup(between),
            ])  # fmt: skip
    return Table(
        f"Against {content['baseline']}",
        ["arm", _column(content), "loss gap", "95 % CI", "factor", "95 % CI", "between sizes"],
        rows,
        note="Loss gap: the baseline's loss minus the arm's, paired by seed; positive means that the arm is better. "
        "Factor: how many times as many parameters the baseline needs for the arm's loss, by the baseline's law. "
        "*: read outside the range of sizes. ∞: below the floor of the law. Between sizes: the same without a law, on "
        "straight lines between neighbouring sizes; ≥ and ≤ mark bounds.",
    )


def _sizes_table(content: Mapping[str, Any]) -> Table:
    rows = [
        [
            f"{size['parameters']:,}", f"{size['non_embedding']:,}", f"{size['steps']:,}", format_count(size["tokens"]),
            arm, found["setting"], str(len(found["losses"])), format_loss(found["mean"]), ", ".join(size["folders"]),
        ]
        for size in content["sizes"]
        for arm, found in size["arms"].items()
    ]  # fmt: skip
    return Table(
        "Every size",
        ["parameters", "outside embeddings", "steps", "tokens", "arm", "setting", "seeds", "loss", "folder"],
        rows,
        text_columns=frozenset({4, 5, 8}),
        note="Only seeds that all arms of a size have are counted.",
    )
