"""Write README.md, details.md and the figures of this study from its data: `measure_principle.py report`."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from blockwise_lr import Block, SharpnessReport, ratios_from_sharpness
from blockwise_lr.drawing import block_colour, figure, log_ticks, save
from blockwise_lr.sharpness import Estimate
from blockwise_lr.sharpness.plot import draw_evolution, plot_density, plot_layers
from blockwise_lr.sharpness.principle import PAPER_ORDER, in_paper_order, order_agreement

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from comparison_tables import table
from measure_principle import SEEDS, read_runs

from pages import write_pages

TITLES = {
    "llama": "LLaMA, vocabulary 3 072, untied head",
    "gpt2": "GPT-2, vocabulary 3 072, tied head",
    "llama-long": "LLaMA, vocabulary 3 072, 2 400 steps",
    "llama-vocab-16k": "LLaMA, vocabulary 16 384, untied head",
}


def write_report(study: Path) -> None:
    """Write the pages and the figures in the folder `study`, from the runs in its data/."""
    runs = read_runs(study / "data")
    draw_figures(study, runs)
    write_text(study, runs)


def draw_figures(study: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Draw sharpness over training, the theory against it, and densities and layers of each case."""
    cases = cases_of(runs)
    draw_principle(runs, cases, study / "sharpness-over-training.png")
    draw_theory(runs, cases, study / "theory-against-measurement.png")
    for name in cases:
        last = of_case(runs, name)[0]["points"][-1]
        plot_density(SharpnessReport.from_dict(last["fisher"]), study / f"density-{name}.png")
        plot_layers(SharpnessReport.from_dict(last["fisher"]), study / f"layers-{name}.png")


def write_text(study: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Write README.md and details.md."""
    cases = [of_case(runs, name) for name in cases_of(runs)]
    tables = {
        "at_the_end": table_at_the_end(cases),
        "cases": "\n\n".join(case_section(case) for case in cases),
        "provenance": provenance(runs),
    }
    write_pages(study, tables)


def cases_of(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the cases that have runs, in the order of SEEDS."""
    return [name for name in SEEDS if any(run["case"] == name for run in runs)]


def table_at_the_end(cases: Sequence[Sequence[dict[str, Any]]]) -> str:
    """One row a case: how well its order agrees with the paper's after the last step, median over the seeds."""
    rows = []
    for runs in cases:
        last = reports_at(runs, -1)
        held = sum(r[Block.QK].mean < r[Block.FFN].mean < r[Block.VO].mean for r in last)
        norm = sorted(r[Block.NORM].mean / r[Block.VO].mean for r in last)
        middle, ends = statistics.median(norm), f" ({norm[0]:.2f} to {norm[-1]:.2f})" if len(norm) > 1 else ""
        rows.append(
            [
                TITLES[runs[0]["case"]],
                str(runs[0]["points"][-1]["step"]),
                str(len(runs)),
                spread(order_agreement(r) for r in last),
                str(held),
                f"{middle:.2f}{ends}",
            ]
        )
    header = ("model", "steps", "seeds", "Kendall's tau", "seeds with QK < FFN < VO", "NORM / VO")
    return table(header, rows)


def of_case(runs: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [run for run in runs if run["case"] == name]


def case_section(runs: Sequence[dict[str, Any]]) -> str:
    """Write the tables of one case."""
    name, blocks = runs[0]["case"], in_paper_order(reports_at(runs, 0)[0])
    seeds = table(
        ("seed", "validation loss at the end"),
        [[str(run["seed"]), f"{run['terminal_val_loss']:.3f}"] for run in runs],
    )
    sharpness, agreement = [], []
    for i, point in enumerate(runs[0]["points"]):
        reports = reports_at(runs, i)
        means = [f"{statistics.mean(r[b].mean for r in reports):.1e}" for b in blocks]
        columns = [
            spread(order_agreement(r) for r in reports),
            spread(empirical_agreement(run["points"][i]) for run in runs) if point["empirical"] else "",
            spread(block_correlation(run["points"][i]) for run in runs),
            spread(parameter_correlation(run["points"][i]) for run in runs),
        ]
        sharpness.append([str(point["step"]), *means])
        agreement.append([str(point["step"]), *columns])
    names = [block.name for block in blocks]
    parts = [
        f"## {TITLES[name]}",
        seeds,
        "Sharpness by `fisher`:",
        table(("step", *names), sharpness),
        "Agreement with the paper's order and with the theory:",
        table(("step", "tau, fisher", "tau, empirical", "theory: blocks", "theory: parameters"), agreement),
        "The other estimators, divided by `fisher`:",
        estimator_table(runs),
        "Ratios from sharpness at the end:",
        ratio_table(runs),
    ]
    return "\n\n".join(parts)


def estimator_table(runs: Sequence[dict[str, Any]]) -> str:
    """The other estimators relative to `fisher`: one row a step and estimator, median over the seeds."""
    blocks, rows = in_paper_order(reports_at(runs, 0)[0]), []
    take: dict[str, Callable[[Any], float]] = {
        "empirical": float,
        "optimizer": float,
        "hutchinson": lambda pair: float(pair[0]),
    }
    for i, point in enumerate(runs[0]["points"]):
        for estimator, value in take.items():
            if not point[estimator]:
                continue
            relative = [
                statistics.median(
                    value(run["points"][i][estimator][b.value])
                    / run["points"][i]["fisher"]["blocks"][b.value][0]
                    for run in runs
                )
                for b in blocks
            ]
            rows.append([str(point["step"]), estimator, *map(two_digits, relative)])
    return table(("step", "estimator", *(block.name for block in blocks)), rows)


def two_digits(value: float) -> str:
    """A number with two significant digits, without an exponent above 1."""
    return f"{float(f'{value:.2g}'):.0f}" if abs(value) >= 10 else f"{value:.2g}"


def ratio_table(runs: Sequence[dict[str, Any]]) -> str:
    """The ratios that ratios_from_sharpness gives at the last step, without limits: mean over the seeds."""
    last = reports_at(runs, -1)
    ratios = [ratios_from_sharpness(report, low=1e-3, high=1e3) for report in last]
    blocks = in_paper_order(last[0])
    means = [f"{statistics.mean(r[block] for r in ratios):.2g}" for block in blocks]
    return table([block.name for block in blocks], [means])


def draw_principle(runs: Sequence[dict[str, Any]], cases: Sequence[str], path: Path) -> None:
    """Sharpness over training, a panel a case; the first seed as lines, all seeds as points."""
    with figure((6.4, 0.4 + 2.9 * ((len(cases) + 1) // 2))) as made:
        panels = panels_of(made, len(cases))
        for axes, name in zip(panels, cases):
            chosen = of_case(runs, name)
            draw_evolution(axes, reports_of(chosen[0]))
            for run in chosen[1:]:
                for report in reports_of(run):
                    for block in report:
                        axes.plot(report.step, report[block].mean, ".", color=block_colour(block), alpha=0.45)
            tau = order_agreement(reports_of(chosen[0])[-1])
            axes.set_title(f"{TITLES[name]}\nKendall's tau at the end {tau:+.1f}", fontsize=9, loc="left")
            if axes not in panels[::2]:
                axes.set_ylabel("")
            axes.tick_params(axis="x", labelsize=8)
        add_legend(made, panels)
        save(made, path)


def draw_theory(runs: Sequence[dict[str, Any]], cases: Sequence[str], path: Path) -> None:
    """Measured sharpness of every parameter against the theory's prediction, at the end of the first seed's run."""
    with figure((6.4, 0.4 + 2.9 * ((len(cases) + 1) // 2))) as made:
        panels = panels_of(made, len(cases))
        for axes, name in zip(panels, cases):
            point = of_case(runs, name)[0]["points"][-1]
            blocks = block_of_parameters(point)
            for parameter, predicted in point["predicted_per_parameter"].items():
                measured = point["fisher"]["per_parameter"][parameter][0]
                block = blocks[parameter]
                axes.plot(predicted, measured, "o", color=block_colour(block), alpha=0.7, markersize=4)
            for block in in_paper_order({Block(b) for b in blocks.values()}):
                axes.plot([], [], "o", color=block_colour(block), label=block.name)
            axes.set_xscale("log")
            axes.set_yscale("log")
            log_ticks(axes.xaxis)
            log_ticks(axes.yaxis)
            axes.set_xlabel("predicted: 1 / (# ||theta||^2)")
            rank = parameter_correlation(point)
            axes.set_title(f"{TITLES[name]}\nSpearman {rank:+.2f} over parameters", fontsize=9, loc="left")
        for axes in panels[::2]:
            axes.set_ylabel("measured S of each parameter")
        add_legend(made, panels)
        save(made, path)


def add_legend(made: Any, panels: Sequence[Any]) -> None:
    """Add one legend of all panels' blocks below them."""
    handles = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles[label] = handle
    order = [b.name for b in in_paper_order(Block(name.lower()) for name in handles)]
    made.legend([handles[n] for n in order], order, loc="outside lower center", ncols=4)


def panels_of(made: Any, count: int) -> list[Any]:
    """Return `count` panels, two a row."""
    panels = list(made.subplots((count + 1) // 2, 2, sharey=True, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    return panels[:count]


def block_of_parameters(point: dict[str, Any]) -> dict[str, str]:
    """The block of each parameter, found from the report: names are those of split models."""
    from measure_principle import case

    from blockwise_lr import classify, split_fused
    from blockwise_lr.train.build_model import build_model

    name = "gpt2" if any("c_attn" in parameter for parameter in point["fisher"]["per_parameter"]) else "llama"
    return {k: v.value for k, v in classify(split_fused(build_model(case(name).model, seed=0))).items()}


def empirical_agreement(point: dict[str, Any]) -> float:
    """Kendall's tau of the `empirical` estimates."""
    return order_agreement(
        {Block(block): Estimate(mean, float("nan"), 0) for block, mean in point["empirical"].items()}
    )


def block_correlation(point: dict[str, Any]) -> float:
    """Spearman's rank correlation of measured and predicted sharpness over the paper's five blocks."""
    names = [b.value for b in PAPER_ORDER if b.value in point["predicted"]]
    return rank([point["predicted"][n] for n in names], [point["fisher"]["blocks"][n][0] for n in names])


def parameter_correlation(point: dict[str, Any]) -> float:
    """Spearman's rank correlation over all parameters for which the theory predicts a sharpness."""
    predicted = point["predicted_per_parameter"]
    return rank(predicted.values(), [point["fisher"]["per_parameter"][name][0] for name in predicted])


def rank(a: Iterable[float], b: Iterable[float]) -> float:
    return float(spearmanr(np.array(list(a)), np.array(list(b))).statistic)


def reports_of(run: dict[str, Any]) -> list[SharpnessReport]:
    return [SharpnessReport.from_dict(point["fisher"]) for point in run["points"]]


def reports_at(runs: Sequence[dict[str, Any]], i: int) -> list[SharpnessReport]:
    return [SharpnessReport.from_dict(run["points"][i]["fisher"]) for run in runs]


def spread(values: Iterable[float]) -> str:
    found = sorted(values)
    middle = statistics.median(found)
    return f"{middle:+.2f}" if len(found) == 1 else f"{middle:+.2f} ({found[0]:+.2f} to {found[-1]:+.2f})"


def provenance(runs: Sequence[dict[str, Any]]) -> str:
    """When, where and with what the runs were made."""
    first = runs[0]
    hardware = first["hardware"]
    return (
        f"{first['date'][:10]}, {hardware['cpu']}, {hardware['cores']} cores, one thread a run; torch "
        f"{first['versions']['torch']}, transformers {first['versions']['transformers']}."
    )
