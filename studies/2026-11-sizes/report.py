"""Write README.md and the figures from the file that run.py wrote.

python studies/2026-11-sizes/report.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blockwise_lr import drawing
from blockwise_lr.compare.scaling_figures import draw_factors, draw_gaps, draw_laws
from blockwise_lr.compare.scaling_wording import format_count, format_factor, format_number, format_range

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from comparison_tables import table

from pages import bullets, write_pages

HERE = Path(__file__).parent
FIGURES: Mapping[str, tuple[tuple[float, float], Callable[..., None]]] = {
    "scaling": ((9.0, 4.8), draw_laws),
    "gaps": ((6.4, 4.2), draw_gaps),
    "factors": ((6.4, 4.2), draw_factors),
}


def load(data: Path = HERE / "data") -> dict[str, Any]:
    """Return what run.py wrote as scaling.json."""
    found: dict[str, Any] = json.loads((data / "scaling.json").read_text(encoding="utf-8"))
    return found


def table_of_fits(content: Mapping[str, Any]) -> str:
    """One row an arm: E, A and alpha with their intervals."""
    rows = [
        [f"`{arm}`"]
        + [
            f"{format_number(fit[name]['value'])} ({format_range(fit[name]['ci95'])})"
            for name in ("E", "A", "alpha")
        ]
        + [f"{fit['rms']:.4f}"]
        for arm, fit in content["fits"].items()
    ]
    return table(["arm", "E", "A", "alpha", "residual"], rows)


def table_of_comparisons(content: Mapping[str, Any]) -> str:
    """One row an arm and size: the nats won, and the factor of parameters."""
    rows = []
    for comparison in content["comparisons"]:
        for size in comparison["sizes"]:
            gap, factor = size["loss_gap"], size["factor"]
            low, high = map(format_factor, factor["ci95"])
            outside = " *" if factor["outside"] else ""
            interval = "" if gap["ci95"] is None else f" ({gap['ci95'][0]:+.3f} to {gap['ci95'][1]:+.3f})"
            rows.append([
                f"`{comparison['arm']}`", f"{size['parameters']:,}", f"{gap['mean']:+.3f}{interval}",
                f"{format_factor(factor['value'])}{outside} ({low} to {high})",
            ])  # fmt: skip
    return table(["arm", "parameters", "nats won", "factor of parameters"], rows)


def table_of_sizes(content: Mapping[str, Any]) -> str:
    """One row a size and arm: the setting that was tuned, and the loss."""
    rows = [
        [
            f"{size['parameters']:,}", f"{size['non_embedding']:,}", format_count(size["tokens"]), f"`{arm}`",
            found["setting"], f"{found['mean']:.4f}",
        ]
        for size in content["sizes"]
        for arm, found in size["arms"].items()
    ]  # fmt: skip
    return table(["parameters", "outside embeddings", "tokens", "arm", "setting", "val loss"], rows)


def tables(content: Mapping[str, Any]) -> dict[str, str]:
    """Return every part of the page that is made from the data."""
    return {
        "answer": bullets(content["answer"]),
        "warnings": bullets(content["warnings"]),
        "fits": table_of_fits(content),
        "comparisons": table_of_comparisons(content),
        "sizes": table_of_sizes(content),
        "facts": f"Seeds {', '.join(map(str, content['seeds']))}; {content['sizes'][0]['steps']:,} steps; "
        f"{content['date'][:10]}.",
        "command": content["command"],
    }


def write(study: Path, content: Mapping[str, Any]) -> None:
    """Write the page and the figures of the study into its folder."""
    for name, (size, draw) in FIGURES.items():
        with drawing.figure(size) as made:
            draw(made, content)
            drawing.save(made, study / f"{name}.png")
    write_pages(study, tables(content), ["README"])


if __name__ == "__main__":
    write(HERE, load())
