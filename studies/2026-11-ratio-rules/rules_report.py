"""Write README.md, details.md and the figure of this study from its data: `compare_rules.py report`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from blockwise_lr.drawing import figure, save

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from comparison_tables import comparisons, nats_won, speedup_of, table
from four_times_steps_table import section_on_four_times_steps

from pages import write_pages

WINS, LOSES, UNDECIDED = "#009E73", "#D55E00", "#555555"
FITTED = ("llama-2m",)
SEARCHLESS, WARMUP = ("measured", "auto", "own"), 0.15


def write_report(study: Path) -> None:
    """Write the pages and the figure in the folder `study` from what is in its data/."""
    data = study / "data"
    studies = {path.parent.name: read_study(path) for path in sorted(data.glob("*/compare.json"))}
    draw_gaps(studies, study / "nats-won-by-rule.png")
    longer = json.loads((data / "four-times-steps.json").read_text())
    tables = {
        "nats_won": table_of_nats(studies),
        "nats_and_speedups": table_of_nats_and_speedups(studies),
        "without_a_search": table_without_search(studies),
        "settings": "\n\n".join(section(name, study) for name, study in studies.items()),
        "four_times_steps": section_on_four_times_steps(longer, studies["llama-2m"]),
        "trials": table_of_trials(json.loads((data / "trials.json").read_text())),
        "cheaper_rules": table_of_cheaper_rules(
            json.loads((data / "cheaper-rules.json").read_text())["tried"]
        ),
    }
    write_pages(study, tables)


def read_study(path: Path) -> dict[str, Any]:
    """Read a setting's compare.json, and the arms of added-rules.json in the same folder (add_rules.py)."""
    study: dict[str, Any] = json.loads(path.read_text())
    if (beside := path.with_name("added-rules.json")).exists():
        study["added"] = added = json.loads(beside.read_text())
        study["arms"] |= added["arms"]
        study["comparisons"] += added["comparisons"]
    return study


def baseline_of(studies: dict[str, Any]) -> str:
    """Return the baseline's name: "tuned" only if its rate is inside the grid at every setting."""
    edge = any(at_edge(study, "uniform") for study in studies.values())
    return "uniform AdamW" if edge else "tuned uniform AdamW"


def at_edge(study: dict[str, Any], arm: str) -> bool:
    """Return whether an arm chose the lowest or highest base learning rate that was tried with its warm-up."""
    chosen = study["arms"][arm]
    rates = {lr for lr, warmup, _ in tuning_of(study, arm) if warmup == chosen["warmup_fraction"]}
    return len(rates) > 1 and chosen["base_lr"] in (min(rates), max(rates))


def rules_of(studies: dict[str, Any]) -> list[str]:
    """Return every rule that some setting compares, in order of first appearance."""
    return list(dict.fromkeys(arm for study in studies.values() for arm in comparisons(study)))


def header_of(studies: dict[str, Any]) -> list[str]:
    return ["rule", *(f"{name}{' (fitted)' if name in FITTED else ''}" for name in studies)]


def table_of_nats(studies: dict[str, Any]) -> str:
    """One row a rule, one column a setting: nats won against the baseline."""
    rows = [
        [rule, *(nats_won(comparisons(study).get(rule)) for study in studies.values())]
        for rule in rules_of(studies)
    ]
    return table(header_of(studies), rows)


def table_of_nats_and_speedups(studies: dict[str, Any]) -> str:
    """Nats won with both speed-ups in square brackets, as the README of the repository shows them."""

    def cell(found: dict[str, Any] | None) -> str:
        won = nats_won(found)
        return (
            f"{won} [{speedup_of(found, 'speedup')}, {speedup_of(found, 'speedup_decayed')}]" if won else ""
        )

    rows = [
        [rule, *(cell(comparisons(study).get(rule)) for study in studies.values())]
        for rule in rules_of(studies)
    ]
    return table(header_of(studies), rows)


def table_without_search(studies: dict[str, Any]) -> str:
    """Nats lost and won at a quarter of the baseline's rate and a warm-up of WARMUP, by setting and rule."""
    header = ["setting", "uniform's base LR", "a quarter of it"]
    header += [f"`{rule}`: {what}" for rule in SEARCHLESS for what in ("lost", "won")]
    rows = []
    for name, study in studies.items():
        uniform = study["arms"]["uniform"]["base_lr"]
        cells = [name, f"{uniform:g}", f"{uniform / 4:.2g}"]
        for rule in SEARCHLESS:
            found = without_a_search(study, rule)
            cells += ["", ""] if found is None else [f"{found[0]:.3f}", f"{found[1]:+.3f}"]
        rows.append(cells)
    return table(header, rows)


def without_a_search(study: dict[str, Any], rule: str) -> tuple[float, float] | None:
    """Return the nats lost to the rule's own best and won against uniform's; None if there is no such run."""
    uniform, best = study["arms"]["uniform"]["base_lr"], min(loss for *_, loss in tuning_of(study, "uniform"))
    tried = tuning_of(study, rule)
    for lr, warmup, loss in tried:
        if warmup == WARMUP and abs(4 * lr / uniform - 1) < 0.01:
            return loss - min(other for *_, other in tried), best - loss
    return None


def tuning_of(study: dict[str, Any], arm: str) -> list[tuple[float, float, float]]:
    """Return base learning rate, warm-up and tune loss of an arm's tuning runs, without diverged ones."""
    n, seed = study["steps"], study["seeds"][0]
    found = [
        (run["base_lr"], run["warmup_fraction"], run["tune_loss"])
        for run in study["tuning"]
        if (run["arm"], run["steps"], run["seed"]) == (arm, n, seed)
    ]
    added = study.get("added", {}).get("arms", {}).get(arm, {}).get("tuning", [])
    found += [(r["point"]["base_lr"], r["point"]["warmup"], r["tune_loss"]) for r in added]
    return [run for run in found if run[-1] is not None]


def section(name: str, study: dict[str, Any]) -> str:
    """A setting's own table: every series with its ratios, chosen learning rate and loss."""
    model = study["config"]["model"]
    lines = [
        f"### {name}",
        "",
        f"{model['family']}, {model['layers']} layers of width {model['hidden_size']}, {study['steps']} steps, seeds "
        f"{', '.join(map(str, study['seeds']))}, {study['date'][:10]}, {study['hardware'].get('cpu')}. "
        f"`{study['command']}`",
        "",
        "| series | ratios | base LR | warm-up | val loss |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, found in study["arms"].items():
        losses = [seed["terminal_val_loss"] for seed in found["seeds"]]
        mean = "diverged" if None in losses else f"{sum(losses) / len(losses):.3f}"
        warmup = found.get("warmup_fraction") or study["config"]["optim"]["warmup_fraction"]
        tuned = f"{found['base_lr']:g} | {warmup:.0%}"
        lines.append(f"| {arm} | {found['ratios']} | {tuned} | {mean} |")
    if added := study.get("added"):
        again = added["again"]
        commands = dict.fromkeys(arm["command"] for arm in added["arms"].values())
        made = ", ".join(f"`{command}`" for command in commands)
        lines += [
            "",
            f"Added on {added['date'][:10]} on {added['hardware'].get('cpu')}, against the same runs of uniform: "
            f"{', '.join(added['arms'])} ({made}). `measured` at seed 0 was trained again there. It ended at "
            f"{again['here']:.4f}, before at {again['committed']:.4f}.",
        ]
    edges = [warning for warning in study["warnings"] if "edge" in warning]
    return "\n".join([*lines, *(f"\n{warning}" for warning in edges)])


def table_of_trials(trials: dict[str, Any]) -> str:
    """The single-seed trials of try_measured_ratios.py, the lowest loss of each setting first."""
    rows = []
    for tried in sorted(trials["tried"], key=lambda t: (t["point"]["setting"], t["tune_loss"])):
        p = tried["point"]
        chosen = [p["setting"], p["ratios_from"], p["ratios"], f"{p['base_lr']:g}", f"{p['warmup']:.0%}"]
        rows.append([*chosen, f"{tried['tune_loss']:.3f}"])
    return table(("setting", "ratios from", "ratios", "base LR", "warm-up", "tune loss"), rows)


def table_of_cheaper_rules(tried: list[dict[str, Any]]) -> str:
    """One row a setting and rule: its tune loss at every base learning rate."""
    losses: dict[tuple[str, str, str], dict[float, float | None]] = {}
    for each in tried:
        point = each["point"]
        row = losses.setdefault((point["setting"], point["rule"], point["ratios"]), {})
        row[point["base_lr"]] = each["tune_loss"]
    lrs = sorted({each["point"]["base_lr"] for each in tried})
    rows = [
        [*of, *("diverged" if (loss := row[lr]) is None else f"{loss:.3f}" for lr in lrs)]
        for of, row in losses.items()
    ]
    return table(("setting", "rule", "ratios", *(f"tune loss at {lr:g}" for lr in lrs)), rows)


def draw_gaps(studies: dict[str, Any], path: Path) -> None:
    """One panel a setting, one row a rule: the gap with its interval, right of the line where it wins."""
    arms = list(dict.fromkeys(arm for study in studies.values() for arm in comparisons(study)))
    with figure((2.0 + 1.9 * len(studies), 1.0 + 0.28 * len(arms))) as made:
        panels = made.subplots(1, len(studies), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (name, study) in zip(panels, studies.items()):
            for row, arm in enumerate(arms):
                gap = comparisons(study).get(arm, {}).get("loss_gap", {})
                if gap.get("mean") is None:
                    continue
                error = 0.0 if gap["ci95"] is None else gap["ci95"][1] - gap["mean"]
                colour = WINS if gap["mean"] > error else LOSES if gap["mean"] < -error else UNDECIDED
                axes.errorbar(gap["mean"], row, xerr=error, fmt="o", color=colour, capsize=2, markersize=4)
            axes.axvline(0, color="#333333", linewidth=0.8)
            axes.set_title(f"{name}\n(fitted)" if name in FITTED else f"{name}\n", fontsize=9)
        panels[0].set_yticks(range(len(arms)), arms)
        panels[0].invert_yaxis()
        label = f"nats won against {baseline_of(studies)} (95 % intervals over seeds)"
        made.supxlabel(label, fontsize=9)
        save(made, path)
