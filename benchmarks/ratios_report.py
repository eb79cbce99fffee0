"""results/ratios/README.md: what each rule for the ratios was worth, at every setting studied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blockwise_lr.drawing import figure, save
from blockwise_lr.files import write_text_atomic

COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#009E73", "#000000", "#56B4E9", "#E69F00", "#999999", "#8a6d3b")
FITTED = ("llama-2m",)


def write_report(results: Path) -> None:
    """README.md and loss_gaps.png in `results`, from the compare.json of each setting there and README.head.md."""
    studies = {
        path.parent.name: json.loads(path.read_text()) for path in sorted(results.glob("*/compare.json"))
    }
    sections = [(results / "README.head.md").read_text(encoding="utf-8").rstrip()]
    if studies:
        draw_gaps(studies, results / "loss_gaps.png")
        sections += ["## Every rule against tuned uniform AdamW", table_of_gaps(studies)]
        sections += ["![Loss gap of every rule](loss_gaps.png)"]
        sections += [section(name, study) for name, study in studies.items()]
    sections += ["## Trials", table_of_trials(json.loads((results / "along" / "tried.json").read_text()))]
    if (cousins := results / "cousins.json").exists():
        sections += ["## Cheaper rules", table_of_cousins(json.loads(cousins.read_text())["tried"])]
    write_text_atomic(results / "README.md", "\n\n".join(sections) + "\n")


def comparisons(study: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By arm: what it was worth against the baseline of as many steps."""
    return {each["arm"]: each for each in study["comparisons"]}


def table_of_gaps(studies: dict[str, Any]) -> str:
    """One row a rule, one column a setting: nats won against tuned uniform AdamW."""
    arms = list(dict.fromkeys(arm for study in studies.values() for arm in comparisons(study)))
    lines = [
        "Nats won (lost: negative) against tuned uniform AdamW at equal steps, with 95 % confidence intervals over "
        "seeds; in brackets the speed-up by the paper's measure, and between fully decayed runs.",
        "",
        "| rule | " + " | ".join(f"{name}{' (fitted)' if name in FITTED else ''}" for name in studies) + " |",
        "| --- |" + " --- |" * len(studies),
    ]
    for arm in arms:
        cells = [gap_cell(comparisons(study).get(arm)) for study in studies.values()]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    edges = [warning for warning in study["warnings"] if "edge" in warning]
    return "\n".join([*lines, *(f"\n{warning}" for warning in edges)])


def table_of_trials(trials: dict[str, Any]) -> str:
    """The single-seed leads of benchmarks/along.py, the lowest loss of each setting first."""
    lines = [
        "Ratios measured along a run (the second column names the measurement in [along/](along)), then trained from "
        "scratch; seed 0, no tuning beyond what the table shows (`benchmarks/along.py`). Leads, from which `measured` "
        "was made.",
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
        "`benchmarks/cousins.py`, which made this table.",
        "",
        "| setting | rule | ratios | " + " | ".join(f"{lr:g}" for lr in lrs) + " |",
        "| --- | --- | --- |" + " --- |" * len(lrs),
    ]
    for (setting, rule, ratios), row in losses.items():
        cells = ["diverged" if (loss := row[lr]) is None else f"{loss:.3f}" for lr in lrs]
        lines.append(f"| {setting} | {rule} | {ratios} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_gaps(studies: dict[str, Any], path: Path) -> None:
    """Bars of the loss gaps, settings side by side."""
    arms = list(dict.fromkeys(arm for study in studies.values() for arm in comparisons(study)))
    width, named = 0.8 / len(arms), set()
    with figure((max(5.0, 2.2 * len(studies) + 2), 4.2)) as made:
        axes = made.subplots()
        for i, arm in enumerate(arms):
            for at, study in enumerate(studies.values()):
                gap = comparisons(study).get(arm, {}).get("loss_gap", {})
                if gap.get("mean") is None:
                    continue
                error = 0.0 if gap["ci95"] is None else gap["ci95"][1] - gap["mean"]
                axes.bar(at + i * width, gap["mean"], width, yerr=error, color=COLOURS[i % len(COLOURS)],
                         ecolor="#333333", label=None if arm in named else arm)  # fmt: skip
                named.add(arm)
        axes.axhline(0, color="#333333", linewidth=0.8)
        axes.set_xticks([at + 0.4 - width / 2 for at in range(len(studies))], list(studies))
        axes.set_ylabel("nats won against tuned uniform AdamW")
        made.legend(fontsize=8, ncols=4, loc="outside lower center")
        save(made, path)
