"""Write README.md, details.md and the figures from the files that run.py wrote, for every model that has them.

python studies/2026-11-robustness/report.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blockwise_lr import drawing
from blockwise_lr.compare.sweep_figure import draw_sweep, sweep_size
from blockwise_lr.compare.sweep_wording import format_edge, format_edges_by_seed, how_tuned
from blockwise_lr.optim.ratios import resolve_ratios
from blockwise_lr.train.build_model import count_parameters
from blockwise_lr.train.config import config_from_dict
from blockwise_lr.train.ratio_text import parse_ratios

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from comparison_tables import table

from pages import bullets, write_pages

HERE = Path(__file__).parent
KINDS = ("robustness", "ablation")

Sweeps = Mapping[str, Mapping[str, Any]]
"""Of one model, by kind: the content of robustness.json and of ablation.json."""


def load(data: Path = HERE / "data") -> dict[str, Sweeps]:
    """Return what run.py wrote, by model, of the models for which both sweeps have ended."""
    files = {
        folder.name: {kind: folder / f"{kind}.json" for kind in KINDS} for folder in sorted(data.glob("*"))
    }
    return {
        model: {kind: json.loads(path.read_text(encoding="utf-8")) for kind, path in paths.items()}
        for model, paths in files.items()
        if all(path.exists() for path in paths.values())
    }


def interval(found: Mapping[str, Any]) -> str:
    """A number of nats with its interval."""
    if found["mean"] is None:
        return "diverged"
    ci95 = found["ci95"]
    return f"{found['mean']:+.3f}" + ("" if ci95 is None else f" ({ci95[0]:+.3f} to {ci95[1]:+.3f})")


def ratio_of(content: Mapping[str, Any], curve: str) -> str:
    ratios = {block.value: ratio for block, ratio in resolve_ratios(parse_ratios(content["ratios"])).items()}
    return f"{ratios[curve]:g}" if curve in ratios else ""


def table_of_widths(content: Mapping[str, Any]) -> str:
    """One row a ratio: the factors at which the loss has risen by 0.01 nats, and their range over seeds."""
    rows = [
        [
            f"`{curve}`", ratio_of(content, curve),
            format_edge(width, "low"), format_edges_by_seed(width, "low"),
            format_edge(width, "high"), format_edges_by_seed(width, "high"),
        ]
        for curve, width in content["widths"].items()
    ]  # fmt: skip
    return table(["ratio of", "ratio", "smallest factor", "over seeds", "largest factor", "over seeds"], rows)


def table_of_worth(content: Mapping[str, Any]) -> str:
    """One row a block: the nats that switching it on wins, in each order."""
    worth = content["worth"]
    blocks = list(next(iter(worth.values())))
    rows = [
        [f"`{block}`", ratio_of(content, block), *(interval(by_block[block]) for by_block in worth.values())]
        for block in blocks
    ]
    return table(["block", "ratio", *worth], rows)


def table_of_points(content: Mapping[str, Any]) -> str:
    """One row an arm: its ratios, its loss, and the rise of the loss."""
    rows = [
        [
            point["arm"], point["setting"],
            "diverged" if point["loss"] is None else f"{point['loss']:.4f}", interval(point["cost"]),
        ]
        for point in content["points"]
    ]  # fmt: skip
    return table(["arm", "setting", "val loss", "rise"], rows)


def facts(content: Mapping[str, Any]) -> str:
    """What was run, as a list."""
    config = config_from_dict(content["config"])
    machine = content["hardware"] or {}
    hardware = ", ".join(f"{key} {value}" for key, value in machine.items() if not isinstance(value, dict))
    size = count_parameters(config.model)
    lines = [
        f"Model: {config.model.family}, {config.model.hidden_size} wide, {config.model.layers} layers, "
        f"{size:,} parameters.",
        f"Steps: {content['steps']:,}. Ratios: `{content['ratios']}`. Optimizer: {content['optimizer']}.",
        f"Seeds: {', '.join(map(str, content['seeds']))}.",
        f"Base learning rate: {how_tuned(content)}.",
        f"Setting of the ratios: {content['points'][0 if content['kind'] == 'robustness' else -1]['setting']}; of "
        f"uniform: {content['baseline']['setting']}.",
        f"Date: {content['date'][:10]}. Hardware: {hardware}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def answers(sweeps: Sweeps) -> str:
    """The sentences of both commands, each once."""
    return bullets(dict.fromkeys([*sweeps["robustness"]["answer"], *sweeps["ablation"]["answer"]]))


def warnings(sweeps: Sweeps) -> str:
    """The warnings of both commands, each once."""
    return bullets(dict.fromkeys([*sweeps["robustness"]["warnings"], *sweeps["ablation"]["warnings"]]))


def tables(found: Mapping[str, Sweeps]) -> dict[str, str]:
    """Return every part of the pages that is made from the data, with the models one below the other."""

    def of_each(part: Callable[[str, Sweeps], str]) -> str:
        return "\n\n".join(f"**Model `{model}`**\n\n{part(model, sweeps)}" for model, sweeps in found.items())

    return {
        "answer": of_each(lambda _, sweeps: answers(sweeps)),
        "warnings": of_each(lambda _, sweeps: warnings(sweeps)),
        "valleys": of_each(
            lambda model, _: f"![Rise of the loss when a ratio is scaled](robustness-{model}.png)"
        ),
        "widths": of_each(lambda _, sweeps: table_of_widths(sweeps["robustness"])),
        "steps": of_each(
            lambda model, _: f"![Loss over the number of blocks that are switched on](ablation-{model}.png)"
        ),
        "worth": of_each(lambda _, sweeps: table_of_worth(sweeps["ablation"])),
        "facts": of_each(lambda _, sweeps: facts(sweeps["robustness"])),
        "scaled": of_each(lambda _, sweeps: table_of_points(sweeps["robustness"])),
        "switched": of_each(lambda _, sweeps: table_of_points(sweeps["ablation"])),
        "commands": "\n".join(sweeps[kind]["command"] for sweeps in found.values() for kind in KINDS),
    }


def write(study: Path, found: Mapping[str, Sweeps]) -> None:
    """Write the pages and the figures of the study into its folder."""
    for model, sweeps in found.items():
        for kind, content in sweeps.items():
            with drawing.figure(sweep_size(content)) as made:
                draw_sweep(made, content)
                drawing.save(made, study / f"{kind}-{model}.png")
    write_pages(study, tables(found))


def main() -> None:
    found = load()
    if not found:
        raise SystemExit(
            f"{HERE / 'data'} holds no model with both sweeps: make them by run.py, then write the page"
        )
    write(HERE, found)


if __name__ == "__main__":
    main()
