"""Write README.md, details.md and the figures from the files that run.py wrote.

python studies/2026-11-samplers/report.py
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blockwise_lr import drawing

sys.path.append(str(Path(__file__).parents[1] / "_support"))

import longer_runs
from comparison_tables import table

from pages import write_pages

HERE = Path(__file__).parent
REFERENCE = "trust-region"
NAMES = ("tpe", "cma-es", "trust-region", "random")
LABELS = {"drawn": "drawn surfaces", "mean": "mean surface", "wide box": "drawn, wide box"}
SHOWN = ((0.3, 0.3), (0.4, 0.4), (0.5, 0.2), (0.5, 0.5), (0.6, 0.4), (0.7, 0.4))
"""The rules in the table of README.md: share and margin."""
OVERTAKERS = {
    "llama-2m, lion, 300 steps": "Lion, 300 steps",
    "llama-600k, 300 steps": "0.6M, 300 steps",
    "llama-2m, muon, 300 steps": "Muon, 300 steps",
    "llama-2m, 1200 steps": "1.8M, 1 200 steps",
}

STARTS = 3
"""Start points of a race on real runs: tuned uniform, half and `measured`."""


def load(name: str, data: Path = HERE / "data") -> dict[str, Any]:
    """Return what run.py wrote as ``NAME.json``."""
    found: dict[str, Any] = json.loads((data / f"{name}.json").read_text(encoding="utf-8"))
    return found


def all_races(
    found: Mapping[str, Any], condition: str, sampler: str, when: str = "end"
) -> np.ndarray[Any, Any]:
    """Return nats below uniform in every race of a condition, half way or at the end, settings one after another."""
    settings = found["nats_below_uniform"][condition].values()
    return np.concatenate([by_sampler[sampler][when] for by_sampler in settings])


def difference(
    found: Mapping[str, Any], condition: str, sampler: str, when: str = "end"
) -> tuple[float, float]:
    """Return how far a sampler ends below the trust-region search, and half of the 95 % interval, paired by race."""
    paired = all_races(found, condition, sampler, when) - all_races(found, condition, REFERENCE, when)
    return float(paired.mean()), float(1.96 * paired.std(ddof=1) / math.sqrt(len(paired)))


def signed(mean: float, half: float) -> str:
    """Format a mean with its interval.

    Example:
        >>> signed(0.0123, 0.004)
        '+0.012 (+0.008 to +0.016)'
    """
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def table_of_samplers(found: Mapping[str, Any]) -> str:
    """One row a sampler: nats below trust-region at the end of the search under every condition, with intervals."""
    header = ["sampler", f"{LABELS['drawn']}, half way", *LABELS.values()]
    columns = [("drawn", "half_way"), *((condition, "end") for condition in LABELS)]
    rows = []
    for name in NAMES:
        cells = [signed(*difference(found, condition, name, when)) for condition, when in columns]
        label = "random points" if name == "random" else f"`{name}`"
        rows.append([label, *("" if name == REFERENCE else cell for cell in cells)])
    return table(header, rows)


def table_of_real_races(found: Mapping[str, Any]) -> str:
    """One row a race on real runs: nats below the best start point after half of the trials and after all."""
    rows = []
    for name, losses in found["races"].items():
        racer, seed = name.rsplit(", seed ", 1)
        start = min(losses[:STARTS])
        below = [start - min(losses[:count]) for count in (len(losses) // 2, len(losses))]
        better = sum(loss < start for loss in losses[STARTS:])
        rows.append([racer, seed, *(f"{each:.3f}" for each in below), f"{better} of {len(losses) - STARTS}"])
    return table(["sampler", "seed", "after 16", "after 32", "trials better than the start"], rows)


def table_of_levels(found: Mapping[str, Any]) -> str:
    """One row a sampler: mean nats below tuned uniform at the end, by condition; first what the start points give."""
    begin = {
        condition: np.mean(
            [each[REFERENCE]["mean"][2] for each in found["nats_below_uniform"][condition].values()]
        )
        for condition in LABELS
    }
    rows = [["the three start points", *(f"{begin[condition]:.3f}" for condition in LABELS)]]
    rows += [
        [f"`{name}`", *(f"{all_races(found, condition, name).mean():.3f}" for condition in LABELS)]
        for name in NAMES
    ]
    return table(["after all trials", *LABELS.values()], rows)


def table_by_setting(found: Mapping[str, Any]) -> str:
    """One row a setting: mean nats below tuned uniform at the end, on drawn surfaces."""
    rows = [
        [setting, *(f"{np.mean(by_sampler[name]['end']):.3f}" for name in NAMES)]
        for setting, by_sampler in found["nats_below_uniform"]["drawn"].items()
    ]
    return table(["setting", *(f"`{name}`" for name in NAMES)], rows)


def table_of_variants(found: Mapping[str, Any]) -> str:
    """One row a sampler with other settings: nats below trust-region with its own settings, on drawn surfaces."""
    made = next(iter(found["nats_below_uniform"]["drawn"].values()))
    return table(
        ["sampler", "nats below `trust-region`"],
        [[name, signed(*difference(found, "drawn", name))] for name in made if name not in NAMES],
    )


def table_of_surrogates(found: Mapping[str, Any]) -> str:
    """One row a setting: what the surrogate was fitted to and its errors on runs left out."""
    header = ["setting", "points", "sets of ratios", "spread of the near runs"]
    header += [
        "error, one run left out",
        "error, all runs of its ratios left out",
        "the latter over expected",
    ]
    rows = []
    for name, each in found["surrogate"].items():
        run, group = each["one_run_left_out"], each["one_ratio_set_left_out"]
        cells = [each["points"], each["ratio_sets"], f"{each['spread']:.3f}"]
        cells += [f"{run['error']:.3f}", f"{group['error']:.3f}", f"{group['error_over_expected']:.2f}"]
        rows.append([name, *map(str, cells)])
    return table(header, rows)


def table_of_rules(found: Mapping[str, Any]) -> str:
    """One row a rule of SHOWN, the chosen one in bold: steps saved and better runs ended, in both halves."""
    header = [
        "no end before",
        "margin",
        "steps saved",
        "better runs ended",
        "searches that lose their best run",
    ]
    rows = []
    for share, margin in SHOWN:
        both = [found["rules"][half][f"{share:g}"][f"{margin:g}"] for half in ("fixed", "tested")]
        cells = [f"{share:.0%}", f"{margin:g}"]
        cells += [f"{np.mean([each[key] for each in both]):.1%}" for key in ("saved", "wrong", "lost")]
        chosen = {"share": share, "margin": margin} == found["chosen"]
        rows.append([f"**{cell}**" if chosen else cell for cell in cells])
    return table(header, rows)


def table_of_grid(found: Mapping[str, Any], key: str, halves: Sequence[str] = ("fixed", "tested")) -> str:
    """One row a share, one column a margin: `key` of the rules, as a mean over the sets of these halves."""
    both = [found["rules"][half] for half in halves]
    margins = list(next(iter(both[0].values())))
    rows = [
        [f"{float(share):.0%}", *(f"{np.mean([half[share][m][key] for half in both]):.1%}" for m in margins)]
        for share in both[0]
    ]
    return table(["no end before", *(f"margin {margin}" for margin in margins)], rows)


def table_of_sets(found: Mapping[str, Any]) -> str:
    """One row a set: the margin that no better run exceeds, by share, and that for the best runs half way."""
    shares = list(found["sets"][0]["needed"])
    header = ["set", "half", "runs", *(f"{float(share):.0%}" for share in shares), "best runs, 60%"]
    rows = [
        [
            each["name"],
            each["half"],
            str(each["runs"]),
            *(f"{each['needed'][share]:.2f}" for share in shares),
            f"{each['needed_near_best']['0.6']:.2f}",
        ]
        for each in found["sets"]
    ]
    return table(header, rows)


def table_of_behind(found: Mapping[str, Any]) -> str:
    """One row a kind of pair: how often the better run is behind at three shares of the run."""
    header = ["what the better run has", "pairs", "at 25 %", "at 50 %", "at 75 %"]
    rows = [
        [kind, str(next(iter(counts.values()))[0]), *(f"{n / pairs:.1%}" for pairs, n in counts.values())]
        for kind, counts in found["behind"].items()
    ]
    return table(header, rows)


def draw_races(found: Mapping[str, Any], path: Path) -> None:
    """Draw nats below tuned uniform against trials, a line a sampler, on drawn and on mean surfaces."""
    trials = np.arange(1, found["trials"] + 1)
    with drawing.figure((9.0, 4.4)) as made:
        panels = made.subplots(1, 2, sharey=True)
        for axes, condition in zip(panels, ("drawn", "mean")):
            for number, name in enumerate(NAMES):
                settings = found["nats_below_uniform"][condition].values()
                mean = np.mean([each[name]["mean"] for each in settings], axis=0)
                style = drawing.series_style(number)
                axes.plot(
                    trials[2:],
                    mean[2:],
                    linewidth=2.2,
                    label=name.replace("random", "random points"),
                    **style,
                )
            axes.set(
                xlabel="trials",
                title={"drawn": "surfaces as rough as the runs", "mean": "smoothest surface"}[condition],
            )
        panels[0].set_ylabel("nats below tuned uniform")
        panels[1].legend(fontsize=12)
        for axes in panels:
            enlarge(axes)
        drawing.save(made, path)


def draw_early_end(found: Mapping[str, Any], path: Path) -> None:
    """Draw the margins that overtaking runs need against the share of the run, and how far some were behind."""
    chosen = found["chosen"]
    with drawing.figure((9.0, 4.4)) as made:
        left, right = made.subplots(1, 2)
        for half, style in (
            ("fixed", {"color": "#0072B2"}),
            ("tested", {"color": "#D55E00", "linestyle": (0, (5, 1.5))}),
        ):
            sets = [each for each in found["sets"] if each["half"] == half]
            for number, each in enumerate(sets):
                shares = [float(share) for share in each["needed"]]
                label = (
                    f"the half that {'fixed' if half == 'fixed' else 'tested'} the rule"
                    if number == 0
                    else None
                )
                left.plot(shares, list(each["needed"].values()), linewidth=1.4, label=label, **style)
        left.plot(chosen["share"], chosen["margin"], "k*", markersize=15, label="the rule", linestyle="none")
        left.set(xlabel="share of the run", ylabel="farthest behind and yet better, nats", ylim=(0, None))
        left.legend(fontsize=11)
        for number, (name, label) in enumerate(OVERTAKERS.items()):
            pair = next(each for each in found["overtaking"] if each["name"] == name)
            right.plot(pair["share"], pair["gap"], linewidth=2.2, label=label, **drawing.series_style(number))
        right.axhline(0, color="#555555", linewidth=1)
        right.set(xlabel="share of the run", ylabel="better run above the worse, nats", xlim=(0, 1))
        right.legend(fontsize=11)
        for axes in (left, right):
            enlarge(axes)
        drawing.save(made, path)


def enlarge(axes: Any) -> None:
    """Make the letters readable on a telephone."""
    axes.tick_params(labelsize=12)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_size(13)


def tables(samplers: Mapping[str, Any], early: Mapping[str, Any]) -> dict[str, str]:
    """Return every table of the pages."""
    return {
        "samplers": table_of_samplers(samplers),
        "real_races": table_of_real_races(load("real_race")),
        "levels": table_of_levels(samplers),
        "by_setting": table_by_setting(samplers),
        "variants": table_of_variants(samplers),
        "surrogates": table_of_surrogates(samplers),
        "rules": table_of_rules(early),
        "saved": table_of_grid(early, "saved"),
        "wrong_fixed": table_of_grid(early, "wrong", ["fixed"]),
        "wrong_tested": table_of_grid(early, "wrong", ["tested"]),
        "lost": table_of_grid(early, "lost"),
        "sets": table_of_sets(early),
        "behind": table_of_behind(early),
        "longer": table(
            ["setting", "runs", "farthest behind and yet better, nats", "better runs ended"],
            longer_runs.rows(load("early-end-longer")),
        ),
    }


def write(study: Path, samplers: Mapping[str, Any], early: Mapping[str, Any]) -> Sequence[Path]:
    """Write the pages and the figures of the study into its folder; return the figures."""
    figures = study / "nats-below-uniform.png", study / "early-end.png"
    draw_races(samplers, figures[0])
    draw_early_end(early, figures[1])
    write_pages(study, tables(samplers, early))
    return figures


if __name__ == "__main__":
    write(HERE, load("samplers"), load("early-end"))
