"""results/ratios/README.md: what each rule for the ratios was worth, at every setting studied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longer_report import section_on_longer

from blockwise_lr.drawing import figure, save
from blockwise_lr.files import write_text_atomic

WINS, LOSES, UNDECIDED = "#009E73", "#D55E00", "#555555"
FITTED = ("llama-2m",)
SEARCHLESS, WARMUP = ("measured", "auto", "own"), 0.15


def write_report(results: Path) -> None:
    """README.md and loss_gaps.png in `results`, from the compare.json of each setting there and README.head.md."""
    studies = {path.parent.name: read_study(path) for path in sorted(results.glob("*/compare.json"))}
    sections = [(results / "README.head.md").read_text(encoding="utf-8").rstrip()]
    if studies:
        draw_gaps(studies, results / "loss_gaps.png")
        sections += [f"## Every rule against {baseline_of(studies)}", table_of_gaps(studies)]
        sections += ["![Loss gap of every rule](loss_gaps.png)"]
        sections += ["## Without a search", table_without_search(studies)]
        sections += [section(name, study) for name, study in studies.items()]
    if (longer := results / "longer.json").exists():
        before = studies.get("llama-2m")
        sections += ["## Four times the steps", section_on_longer(json.loads(longer.read_text()), before)]
    sections += ["## Trials", table_of_trials(json.loads((results / "along" / "tried.json").read_text()))]
    if (cousins := results / "cousins.json").exists():
        sections += ["## Cheaper rules", table_of_cousins(json.loads(cousins.read_text())["tried"])]
    write_text_atomic(results / "README.md", "\n\n".join(sections) + "\n")


def read_study(path: Path) -> dict[str, Any]:
    """A setting's compare.json, with the arms of further.json beside it (benchmarks/further.py) if there are any."""
    study: dict[str, Any] = json.loads(path.read_text())
    if (beside := path.with_name("further.json")).exists():
        study["further"] = further = json.loads(beside.read_text())
        study["arms"] |= further["arms"]
        study["comparisons"] += further["comparisons"]
    return study


def baseline_of(studies: dict[str, Any]) -> str:
    """What the baseline is called: "tuned" only where its rate is inside the grid at every setting."""
    edge = any(at_edge(study, "uniform") for study in studies.values())
    return "uniform AdamW" if edge else "tuned uniform AdamW"


def at_edge(study: dict[str, Any], arm: str) -> bool:
    """Whether an arm's chosen base learning rate is the lowest or highest that was tried with its warm-up."""
    chosen = study["arms"][arm]
    rates = {lr for lr, warmup, _ in tuning_of(study, arm) if warmup == chosen["warmup_fraction"]}
    return len(rates) > 1 and chosen["base_lr"] in (min(rates), max(rates))


def comparisons(study: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By arm: what it was worth against the baseline of as many steps."""
    return {each["arm"]: each for each in study["comparisons"]}


def table_of_gaps(studies: dict[str, Any]) -> str:
    """One row a rule, one column a setting: nats won against tuned uniform AdamW."""
    arms = list(dict.fromkeys(arm for study in studies.values() for arm in comparisons(study)))
    lines = [
        f"Nats won (lost: negative) against {baseline_of(studies)} at equal steps, with 95 % confidence intervals over "
        "seeds; in brackets the speed-up by the paper's measure, and between fully decayed runs.",
        "",
        "| rule | " + " | ".join(f"{name}{' (fitted)' if name in FITTED else ''}" for name in studies) + " |",
        "| --- |" + " --- |" * len(studies),
    ]
    for arm in arms:
        cells = [gap_cell(comparisons(study).get(arm)) for study in studies.values()]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_without_search(studies: dict[str, Any]) -> str:
    """What SEARCHLESS cost at a quarter of the baseline's rate and a warm-up of WARMUP, not at their best."""
    lines = [
        "`measured`, `auto` and `own` at a quarter of the base learning rate that was tuned for uniform, and a warm-up "
        f"of {WARMUP:.0%}, whatever uniform's: by how many nats the loss is higher than at the best base rate and "
        "warm-up that were found for them, and what is still won against tuned uniform; of tune losses at seed 0, which"
        " all these runs are chosen by. From the tuning of the tables below; a cell is empty if that rate was not tried"
        " in it (`own` on llama-2m: 0.042 by one of the [trials](#trials)).",
        "",
        "| setting | uniform's | a quarter | "
        + " | ".join(f"{rule}: lost | won" for rule in SEARCHLESS)
        + " |",
        "| --- | --- | --- |" + " --- | --- |" * len(SEARCHLESS),
    ]
    for name, study in studies.items():
        uniform = study["arms"]["uniform"]["base_lr"]
        found = [without_a_search(study, rule) for rule in SEARCHLESS]
        cells = ["" if each is None else f"{each[0]:.3f} | {each[1]:+.3f}" for each in found]
        lines.append(
            f"| {name} | {uniform:g} | {uniform / 4:.2g} | {' | '.join(c or ' | ' for c in cells)} |"
        )
    return "\n".join(lines)


def without_a_search(study: dict[str, Any], rule: str) -> tuple[float, float] | None:
    """Nats lost to the rule's own best, and won against uniform's; None: not run there."""
    uniform, best = study["arms"]["uniform"]["base_lr"], min(loss for *_, loss in tuning_of(study, "uniform"))
    tried = tuning_of(study, rule)
    for lr, warmup, loss in tried:
        if warmup == WARMUP and abs(4 * lr / uniform - 1) < 0.01:
            return loss - min(other for *_, other in tried), best - loss
    return None


def tuning_of(study: dict[str, Any], arm: str) -> list[tuple[float, float, float]]:
    """Base learning rate, warm-up and tune loss of an arm's runs of N steps at the first seed that did not diverge."""
    n, seed = study["steps"], study["seeds"][0]
    found = [
        (run["base_lr"], run["warmup_fraction"], run["tune_loss"])
        for run in study["tuning"]
        if (run["arm"], run["steps"], run["seed"]) == (arm, n, seed)
    ]
    further = study.get("further", {}).get("arms", {}).get(arm, {}).get("tuning", [])
    found += [(r["point"]["base_lr"], r["point"]["warmup"], r["tune_loss"]) for r in further]
    return [run for run in found if run[-1] is not None]


def gap_cell(found: dict[str, Any] | None) -> str:
    if found is None or found["loss_gap"]["mean"] is None:
        return ""
    gap = found["loss_gap"]
    interval = "" if gap["ci95"] is None else f" ({gap['ci95'][0]:+.3f} .. {gap['ci95'][1]:+.3f})"
    return f"{gap['mean']:+.3f}{interval} [{speedup(found['speedup'])}, {speedup(found['speedup_decayed'])}]"


def speedup(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "-"
    return {"exact": "", "at_least": ">= ", "at_most": "<= "}[found["bound"]] + f"{found['value']:.2f}x"


def section(name: str, study: dict[str, Any]) -> str:
    """A setting's own table: every series with its ratios, chosen learning rate and loss."""
    model = study["config"]["model"]
    lines = [
        f"## {name}",
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
    if further := study.get("further"):
        again = further["again"]
        commands = dict.fromkeys(arm["command"] for arm in further["arms"].values())
        made = ", ".join(f"`{command}`" for command in commands)
        lines += [
            "",
            f"{', '.join(further['arms'])}: later, {further['date'][:10]}, {further['hardware'].get('cpu')}, against "
            f"the same runs of uniform ({made}); `measured` at seed 0, trained once more there, "
            f"ended at {again['here']:.4f} ({again['committed']:.4f} before).",
        ]
    edges = [warning for warning in study["warnings"] if "edge" in warning]
    return "\n".join([*lines, *(f"\n{warning}" for warning in edges)])


def table_of_trials(trials: dict[str, Any]) -> str:
    """The single-seed leads of benchmarks/along.py, the lowest loss of each setting first."""
    lines = [
        "Ratios measured along a run (the second column says which; what was measured there is in "
        "[tried.json](along/tried.json)), then trained from scratch; seed 0, no tuning beyond what the table shows "
        "(`benchmarks/along.py`). Leads: `measured` was made from those of llama-2m-1e-3 and llama-2m-4e-3, by the "
        "earlier form of the measurement; `own` are of the present one.",
        "",
        "| setting | ratios from | ratios | base LR | warm-up | tune loss |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for tried in sorted(trials["tried"], key=lambda t: (t["point"]["setting"], t["tune_loss"])):
        p = tried["point"]
        lines.append(
            f"| {p['setting']} | {p['ratios_from']} | {p['ratios']} | {p['base_lr']:g} | {p['warmup']:.0%} | "
            f"{tried['tune_loss']:.3f} |"
        )
    return "\n".join(lines)


def table_of_cousins(tried: list[dict[str, Any]]) -> str:
    """A row for each setting and rule, with its tune loss at every base learning rate."""
    losses: dict[tuple[str, str, str], dict[float, float | None]] = {}
    for each in tried:
        point = each["point"]
        row = losses.setdefault((point["setting"], point["rule"], point["ratios"]), {})
        row[point["base_lr"]] = each["tune_loss"]
    lrs = sorted({each["point"]["base_lr"] for each in tried})
    lines = [
        "Tune loss at each base learning rate, seed 0, warm-up 15 %; how each rule measures is said in "
        "`benchmarks/cousins.py` and, for those measured in the run, `benchmarks/in_run.py`.",
        "",
        "| setting | rule | ratios | " + " | ".join(f"{lr:g}" for lr in lrs) + " |",
        "| --- | --- | --- |" + " --- |" * len(lrs),
    ]
    for (setting, rule, ratios), row in losses.items():
        cells = ["diverged" if (loss := row[lr]) is None else f"{loss:.3f}" for lr in lrs]
        lines.append(f"| {setting} | {rule} | {ratios} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
