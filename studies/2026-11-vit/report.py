"""Write README.md, details.md and the figures from the runs in data/runs.

python studies/2026-11-vit/report.py
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from along_the_run import (
    BLOCKS,
    PAIRS,
    directional_table,
    draw_sharpness,
    order_counts,
    order_table,
    sharpness_table,
)
from arms import RULES, SHAPES, Arm
from plan import BASELINE, LONG, SHORT, patches, tuning
from run import RESULTS, load
from tuned import MODELS, TUNED, Found, all_tuned, gap, speedup
from tuning import Results

from blockwise_lr import drawing
from blockwise_lr.compare.over_seeds import LossGap

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from _support.comparison_tables import table, thousands  # noqa: E402
from _support.pages import write_pages  # noqa: E402


def _gap_cell(found: LossGap, seeds: int) -> str:
    if found.mean is None:
        return "diverged"
    if found.ci95 is None:
        return f"{found.mean:+.3f} (one seed)" if seeds == 1 else f"{found.mean:+.3f}"
    return f"{found.mean:+.3f} ({found.ci95[0]:+.3f} to {found.ci95[1]:+.3f})"


def gains_table(found: Found) -> str:
    """One row a model, length and rule: val loss, accuracy, what is won over uniform, and the speed-up."""
    rows = []
    for (shape, steps, rule), each in found.items():
        uniform = found.get((shape, steps, "uniform"))
        if uniform is None:
            continue
        rows.append(
            [
                SHAPES[shape].library,
                thousands(steps),
                rule,
                f"{each.mean('val_loss'):.3f}",
                f"{each.mean('val_accuracy'):.1%}",
                *(
                    ("-", "-")
                    if rule == "uniform"
                    else (_gap_cell(gap(uniform, each), len(each.runs)), speedup(found, shape, steps, rule))
                ),
            ]
        )
    return table(["model of", "steps", "rule", "val loss", "accuracy", "nats won", "speed-up"], rows)


def answer(found: Found, results: Results) -> str:
    """The answer in sentences that follow from the runs."""
    lines = []
    for steps in (SHORT, LONG):
        uniform = found.get(("vit", steps, "uniform"))
        said = []
        for rule in TUNED[1:]:
            each = found.get(("vit", steps, rule))
            if uniform and each and (won := gap(uniform, each)).mean is not None:
                verdict = "wins" if won.mean > 0 else "loses"
                clear = won.ci95 is not None and won.ci95[0] * won.ci95[1] > 0
                said.append(f"`{rule}` {verdict} {abs(won.mean):.3f} nats{'' if clear else ' (not clear)'}")
        if said:
            lines.append(f"- Against tuned uniform over {thousands(steps)} steps: " + "; ".join(said))
    counts = order_counts(results)
    if (run := counts.get("uniform")) is not None:
        holds = [
            f"{a.upper()} < {b.upper()} at {run[a, b][0]} of {run[a, b][1]} points" for a, b in PAIRS[:3]
        ]
        lines.append(f"- Sharpness along the uniform run: {', '.join(holds)}")
    return "\n".join(f"{line}." for line in lines)


def ratios_table(found: Found) -> str:
    """The ratios of every rule, over that of FFN."""
    rows = []
    for rule in TUNED[1:]:
        if (each := found.get(("vit", SHORT, rule))) is not None:
            ratios = each.arm.ratios
            cells = [f"{ratios.get(block, 1.0) / ratios.get('ffn', 1.0):.3g}" for block in BLOCKS]
            rows.append([rule, *cells])
    return table(["rule", *(block.upper() for block in BLOCKS)], rows)


def patches_table(found: Found, results: Results) -> str:
    """What a rule gains if the patch embedding, and the positions, get the ratio of EMB; val loss at seed 0."""
    rows = []
    for (rule, name), arm in patches("vit", results).items():
        run, tuned = results.runs.get(arm.name), found.get(("vit", SHORT, rule))
        if run is not None and tuned is not None:
            won = "diverged" if run["val_loss"] is None else f"{tuned.losses[0] - run['val_loss']:+.3f}"
            rows.append([rule, name, won])
    return table(["rule", "ratio of EMB for", "nats won"], rows)


def settings_table(found: Found) -> str:
    """The base learning rate and warm-up that were chosen for every rule."""
    rows = [
        [SHAPES[shape].library, f"{steps}", rule, f"{each.arm.base_lr:.2g}", f"{each.arm.warmup:.0%}"]
        for (shape, steps, rule), each in found.items()
    ]
    return table(["model of", "steps", "rule", "base LR", "warm-up"], rows)


def baseline_table(results: Results) -> str:
    """What the uniform baseline gains by each further setting, in nats of the tune loss."""
    rows = []
    for shape in MODELS:
        for steps in (SHORT, LONG):
            arms, best = tuning(shape, steps, "uniform", results)
            if best is None:
                continue
            usual = results.best(arms[: -len(BASELINE)])
            first = results.loss(usual) if usual else None
            if first is not None:
                losses = [results.loss(arm) or 0.0 for arm in arms[-len(BASELINE) :]]
                rows.append([SHAPES[shape].library, f"{steps}", *(f"{first - loss:+.3f}" for loss in losses)])
    return table(["model of", "steps", *BASELINE], rows)


def runs_table(results: Results) -> str:
    """Every run, in the order of model, steps, ratios and learning rate."""
    names = {tuple(sorted(ratios.items())): name for name, ratios in RULES.items()}
    rows = []
    for run in results.runs.values():
        arm = Arm(**run["arm"])
        usual = Arm(arm.shape, arm.steps, arm.base_lr, arm.ratios, arm.warmup, arm.seed)
        changed = [f"{k} {v}" for k, v in arm.to_dict().items() if v != usual.to_dict()[k]]
        key = (arm.shape, arm.steps, str(sorted(arm.ratios.items())), arm.base_lr, arm.seed, arm.name)
        rule = names.get(tuple(sorted(arm.ratios.items())))
        ratios = rule or ", ".join(f"{block} {ratio:.3g}" for block, ratio in arm.ratios.items())
        values = [run[k] for k in ("tune_loss", "val_loss", "val_accuracy")]
        ends = ["diverged" if value is None else f"{value:.4f}" for value in values]
        cells = [ratios, f"{arm.base_lr:.3g}", f"{arm.warmup:.0%}", f"{arm.seed}", ", ".join(changed)]
        rows.append((key, [SHAPES[arm.shape].library, f"{arm.steps}", *cells, *ends]))
    header = ["model of", "steps", "ratios", "base LR", "warm-up", "seed", "other"]
    rows.sort(key=lambda row: row[0])
    return table([*header, "tune loss", "val loss", "val accuracy"], [row for _, row in rows])


def draw_gains(found: Found, path: Path) -> bool:
    """Draw the nats that every rule wins over tuned uniform, by length of run; return whether there are any."""
    rules = [rule for rule in TUNED[1:] if ("vit", SHORT, rule) in found]
    if not rules or ("vit", SHORT, "uniform") not in found:
        return False
    with drawing.figure((6.4, 1.2 + 0.6 * len(rules))) as made:
        axes = made.subplots()
        for number, steps in enumerate(
            steps for steps in (SHORT, LONG) if ("vit", steps, "uniform") in found
        ):
            there = [rule for rule in rules if ("vit", steps, rule) in found]
            gaps = [gap(found["vit", steps, "uniform"], found["vit", steps, rule]) for rule in there]
            axes.errorbar(
                [each.mean if each.mean is not None else math.nan for each in gaps],
                [rules.index(rule) + 0.2 * number for rule in there],
                xerr=[0.0 if each.ci95 is None else (each.ci95[1] - each.ci95[0]) / 2 for each in gaps],
                marker="o",
                capsize=3,
                label=f"{thousands(steps)} steps",
                **drawing.series_style(number) | {"linestyle": "none"},
            )
        axes.axvline(0, color="#777777", linewidth=1)
        axes.set_yticks(range(len(rules)), rules)
        axes.invert_yaxis()
        axes.set_xlabel("nats won over tuned uniform")
        axes.legend()
        drawing.save(made, path)
    return True


def tables(results: Results) -> dict[str, str]:
    """Return every table of the pages by its name in the templates."""
    found = all_tuned(results)
    every = {
        "gains": gains_table(found),
        "ratios": ratios_table(found),
        "order": order_table(results),
        "sharpness": sharpness_table(results, "uniform", "fisher"),
        "sharpness_half": sharpness_table(results, "half", "fisher"),
        "sharpness_hessian": sharpness_table(results, "uniform", "hutchinson"),
        "directional": directional_table(results, "uniform"),
        "directional_slow": directional_table(results, "uniform, a quarter of the rate"),
        "patches": patches_table(found, results),
        "settings": settings_table(found),
        "baseline": baseline_table(results),
        "runs": runs_table(results),
    }
    return {name: text if text.count("\n") > 1 else "None yet." for name, text in every.items()} | {
        "answer": answer(found, results) or "Not answered yet: the runs are being made."
    }


def machine(results: Results) -> str:
    """The processors and the dates of the runs."""
    processors = sorted({run["hardware"]["cpu"] for run in results.runs.values()})
    dates = sorted({run["date"][:10] for run in results.runs.values()})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"one thread of {' and '.join(processors)}, {when}"


def main() -> None:
    results = load(RESULTS)
    if not results.runs:
        raise SystemExit(f"no run has ended in {RESULTS}: make them by run.py, then write the page")
    shown = tables(results)
    sharp = draw_sharpness(results, HERE / "sharpness-along-the-run.png")
    gains = draw_gains(all_tuned(results), HERE / "nats-won.png")
    shown["sharpness_figure"] = _image(
        "Average sharpness of every block", "sharpness-along-the-run.png", sharp
    )
    shown["gains_figure"] = _image("Nats that every rule wins over tuned uniform", "nats-won.png", gains)
    shown["machine"] = machine(results)
    # The templates name no page or figure that may not be there yet.
    shown["to_details"], shown["to_answer"] = "[details](details.md)", "[answer](README.md)"
    write_pages(HERE, shown)


def _image(text: str, file: str, there: bool) -> str:
    return f"![{text}]({file})" if there else ""


if __name__ == "__main__":
    main()
