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
BLOCKS = ("emb", "qk", "ffn", "vo", "norm", "head", "pos")
FAMILIES = {"gpt2": "GPT-2", "llama": "LLaMA"}
SEARCHLESS, WARMUP = ("measured", "auto", "own"), 0.15


def write_report(study: Path) -> None:
    """Write the pages and the figure in the folder `study` from what is in its data/."""
    data = study / "data"
    studies = {path.parent.name: read_study(path) for path in sorted(data.glob("*/compare.json"))}
    draw_gaps(studies, study / "nats-won-by-rule.png")
    cheaper = tables_of_cheaper_rules(json.loads((data / "cheaper-rules.json").read_text())["tried"])
    longer = json.loads((data / "four-times-steps.json").read_text())
    tables = {
        "nats_won": table_of_nats(studies),
        "speedups": table_of_speedups(studies, "speedup"),
        "decayed_speedups": table_of_speedups(studies, "speedup_decayed"),
        "ratios": table_of_ratios(studies, longer),
        "without_a_search": table_without_search(studies),
        "settings": "\n\n".join(section(name, study) for name, study in studies.items()),
        "four_times_steps": section_on_four_times_steps(longer, studies["llama-2m"]),
        "trials": table_of_trials(json.loads((data / "trials.json").read_text())),
        "cheaper_rules": cheaper[0],
        "rules_during_training": cheaper[1],
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


def table_of_speedups(studies: dict[str, Any], kind: str) -> str:
    """One row a rule, one column a setting: `kind` is "speedup" (the paper's) or "speedup_decayed"."""
    rows = [
        [rule, *(speedup_of(comparisons(study).get(rule), kind) for study in studies.values())]
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
    """A setting's own table: every rule with its chosen learning rate, warm-up and loss; how it was run."""
    model, cpu = study["config"]["model"], study["hardware"].get("cpu")
    rows = []
    for arm, found in study["arms"].items():
        losses = [seed["terminal_val_loss"] for seed in found["seeds"]]
        mean = "diverged" if None in losses else f"{sum(losses) / len(losses):.3f}"
        warmup = found.get("warmup_fraction") or study["config"]["optim"]["warmup_fraction"]
        rows.append([arm, f"{found['base_lr']:g}", f"{warmup:.0%}", mean])
    parts = [
        f"### {name}",
        f"{FAMILIES[model['family']]}, {model['layers']} layers of width {model['hidden_size']}, "
        f"{study['steps']} steps, seeds {', '.join(map(str, study['seeds']))}. "
        f"Run on {study['date'][:10]} on {cpu}:",
        shell(study["command"]),
        table(("rule", "base LR", "warm-up", "val loss"), rows),
        *(warning for warning in study["warnings"] if "edge" in warning),
    ]
    if added := study.get("added"):
        again = added["again"]
        parts += [
            f"Added on {added['date'][:10]} on {added['hardware'].get('cpu')}, against the same runs of uniform: "
            f"{'; '.join(added['arms'])}. As a check, `measured` was trained again there at seed 0. It ended at "
            f"{again['here']:.4f}, before at {again['committed']:.4f}.",
            shell(*dict.fromkeys(arm["command"] for arm in added["arms"].values())),
        ]
    return "\n\n".join(parts)


def shell(*commands: str) -> str:
    """A block of commands."""
    return "\n".join(["```", *commands, "```"])


def ratio_cells(setting: str, ratios: str) -> list[str]:
    """Return one cell a block of BLOCKS for pairs such as "emb=16,vo=0.5"; empty if the model lacks the block.

    A block without a pair has the ratio 1.
    """
    pairs = dict(pair.split("=") for pair in ratios.split(","))
    lacking = "head" if setting.startswith("gpt2") else "pos"
    return ["" if block == lacking else pairs.get(block, "1") for block in BLOCKS]


def table_of_ratios(studies: dict[str, Any], longer: dict[str, Any]) -> str:
    """The ratios of the rules that have other ratios in every setting: the `own` rules and those by sharpness."""
    found = [
        (name, rule, arm["ratios"])
        for name, study in studies.items()
        for rule, arm in study["arms"].items()
        if rule.startswith(("own", "S^"))
    ]
    four_times = {run["point"]["ratios"] for run in longer["runs"] if run["point"]["rule"] == "own"}
    found += [(f"llama-2m, {longer['steps']} steps", "own", ratios) for ratios in four_times]
    header = ("setting", "rule", *(block.upper() for block in BLOCKS))
    return table(header, [[name, rule, *ratio_cells(name, ratios)] for name, rule, ratios in found])


def table_of_trials(trials: dict[str, Any]) -> str:
    """The single-seed trials of try_measured_ratios.py, the lowest loss of each setting first."""
    rows = []
    for tried in sorted(trials["tried"], key=lambda t: (t["point"]["setting"], t["tune_loss"])):
        p = tried["point"]
        chosen = [*ratio_cells(p["setting"], p["ratios"]), f"{p['base_lr']:g}", f"{p['warmup']:.0%}"]
        rows.append([p["setting"], p["ratios_from"], *chosen, f"{tried['tune_loss']:.3f}"])
    header = ("setting", "ratios from", *(b.upper() for b in BLOCKS), "base LR", "warm-up", "tune loss")
    return table(header, rows)


def tables_of_cheaper_rules(tried: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the table of rules with fixed ratios, and the table of rules that find their ratios during the run.

    Both have one row a setting and rule, and its tune loss at every base learning rate.
    """
    losses: dict[tuple[str, str, str], dict[float, float | None]] = {}
    for each in tried:
        point = each["point"]
        row = losses.setdefault((point["setting"], point["rule"], point["ratios"]), {})
        row[point["base_lr"]] = each["tune_loss"]
    lrs = sorted({each["point"]["base_lr"] for each in tried})
    fixed, moving = [], []
    for (setting, rule, ratios), row in losses.items():
        cells = ["diverged" if (loss := row[lr]) is None else f"{loss:.3f}" for lr in lrs]
        if "=" in ratios and not ratios.startswith("auto"):
            fixed.append([setting, rule, *ratio_cells(setting, ratios), *cells])
        else:
            spec = f"`{ratios}`" if ratios.startswith("auto") else ""
            moving.append([setting, rule, spec, *cells])
    at = tuple(f"tune loss at {lr:g}" for lr in lrs)
    return (
        table(("setting", "rule", *(block.upper() for block in BLOCKS), *at), fixed),
        table(("setting", "rule", "`--ratios`", *at), moving),
    )


def draw_gaps(studies: dict[str, Any], path: Path) -> None:
    """One panel a setting, one row a rule: the gap with its interval, right of the line where it wins.

    The figure shows the rules that at least three settings compare, so that it can be read on a phone.
    """
    arms = [arm for arm in rules_of(studies) if sum(arm in comparisons(s) for s in studies.values()) >= 3]
    rows = (len(studies) + 1) // 2
    with figure((5.0, 0.5 + rows * (0.6 + 0.24 * len(arms)))) as made:
        panels = made.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flat
        for axes, (name, study) in zip(panels, studies.items()):
            for row, arm in enumerate(arms):
                gap = comparisons(study).get(arm, {}).get("loss_gap", {})
                if gap.get("mean") is None:
                    continue
                error = 0.0 if gap["ci95"] is None else gap["ci95"][1] - gap["mean"]
                colour = WINS if gap["mean"] > error else LOSES if gap["mean"] < -error else UNDECIDED
                axes.errorbar(gap["mean"], row, xerr=error, fmt="o", color=colour, capsize=2, markersize=4)
            axes.axvline(0, color="#333333", linewidth=0.8)
            axes.set_title(f"{name} (fitted)" if name in FITTED else name, fontsize=10)
            axes.set_yticks(range(len(arms)), arms)
        panels[0].set_ylim(len(arms) - 0.5, -0.5)
        made.supxlabel(f"nats won against {baseline_of(studies)} (95 % intervals)", fontsize=10)
        save(made, path)
