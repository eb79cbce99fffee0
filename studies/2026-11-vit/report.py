"""Write README.md, details.md and the figures from the runs in data/runs.

python studies/2026-11-vit/report.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "_support"))

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
from baseline import gains_of_changes
from comparison_tables import other_settings, progress, table, thousands
from found_ratios import found_ratios
from gain_figure import draw_gains
from gaps import gap, gap_cell
from plan import BASELINE, LONG, MODELS, SEARCHED_FROM, SHORT, SPACE, patches, rates, search
from run import RESULTS
from text_runs import load
from tuned import TUNED, Found, all_tuned, speedup
from tuning import Results

from blockwise_lr.compare.over_seeds import LossGap
from pages import bullets, filled, image, write_pages

HERE = Path(__file__).parent


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
                    else (
                        gap_cell(gap(uniform.losses, each.losses), len(each.runs)),
                        speedup(found, shape, steps, rule),
                    )
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
            if uniform and each and (won := gap(uniform.losses, each.losses)).mean is not None:
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


def state(found: Found) -> str:
    """Which rules are tuned, by model and length."""
    return bullets(
        progress(
            f"{SHAPES[shape].library}, {thousands(steps)} steps",
            rules,
            {rule for model, n, rule in found if (model, n) == (shape, steps)},
        )
        for shape, steps, rules in (
            ("vit", SHORT, TUNED),
            ("vit", LONG, tuple(RULES)),
            ("vit-timm", SHORT, tuple(RULES)),
        )
    )


def ratios_table(found: Found, results: Results) -> str:
    """The ratios of every rule, over that of FFN; those of the search with their valleys."""
    rows = []
    for rule in TUNED[1:]:
        if (each := found.get(("vit", SHORT, rule))) is None:
            continue
        ratios = each.arm.ratios
        cells = {block: f"{ratios.get(block, 1.0) / ratios.get('ffn', 1.0):.3g}" for block in BLOCKS}
        if rule == "searched":
            starts = [rates("vit", SHORT, start, results)[1] for start in SEARCHED_FROM]
            arms = [*search("vit", results)[0], *(arm for arm in starts if arm is not None)]
            valleys = found_ratios(each.arm, arms, SPACE, results)
            cells |= {block: valleys.cell(block) for block in SPACE.blocks}
        rows.append([rule, *cells.values()])
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
    """The base learning rate, the warm-up and what else was chosen for every rule."""
    rows = [
        [
            SHAPES[shape].library,
            f"{steps}",
            rule,
            f"{each.arm.base_lr:.2g}",
            f"{each.arm.warmup:.0%}",
            other_settings(each.arm) or "-",
        ]
        for (shape, steps, rule), each in found.items()
    ]
    return table(["model of", "steps", "rule", "base LR", "warm-up", "other"], rows)


def baseline_table(results: Results) -> str:
    """What the uniform baseline gains by each further setting, in nats of the tune loss."""
    rows = []
    for shape in MODELS:
        for steps in (SHORT, LONG):
            best = rates(shape, steps, "uniform", results)[1]
            if best is not None:
                rows.append([SHAPES[shape].library, f"{steps}", *gains_of_changes(best, BASELINE, results)])
    return table(["model of", "steps", *BASELINE], rows)


def runs_table(results: Results) -> str:
    """Every run, in the order of model, steps, ratios and learning rate."""
    names = {tuple(sorted(ratios.items())): name for name, ratios in RULES.items()}
    rows = []
    for run in results.runs.values():
        arm = Arm(**run["arm"])
        key = (arm.shape, arm.steps, str(sorted(arm.ratios.items())), arm.base_lr, arm.seed, arm.name)
        rule = names.get(tuple(sorted(arm.ratios.items())))
        ratios = rule or ", ".join(f"{block} {ratio:.3g}" for block, ratio in arm.ratios.items())
        values = [run[k] for k in ("tune_loss", "val_loss", "val_accuracy")]
        ends = ["diverged" if value is None else f"{value:.4f}" for value in values]
        cells = [ratios, f"{arm.base_lr:.3g}", f"{arm.warmup:.0%}", f"{arm.seed}", other_settings(arm)]
        rows.append((key, [SHAPES[arm.shape].library, f"{arm.steps}", *cells, *ends]))
    header = ["model of", "steps", "ratios", "base LR", "warm-up", "seed", "other"]
    rows.sort(key=lambda row: row[0])
    return table([*header, "tune loss", "val loss", "val accuracy"], [row for _, row in rows])


def gains(found: Found) -> dict[str, dict[str, LossGap]]:
    """Return the nats that every rule wins over tuned uniform, by model and length, and by rule."""
    every: dict[str, dict[str, LossGap]] = {}
    for (shape, steps, rule), each in found.items():
        uniform = found.get((shape, steps, "uniform"))
        if uniform is not None and rule != "uniform":
            won = every.setdefault(f"{SHAPES[shape].library}, {thousands(steps)} steps", {})
            won[rule] = gap(uniform.losses, each.losses)
    return every


def tables(results: Results) -> dict[str, str]:
    """Return every table of the pages by its name in the templates."""
    found = all_tuned(results)
    every = {
        "gains": gains_table(found),
        "ratios": ratios_table(found, results),
        "order": order_table(results),
        "sharpness": sharpness_table(results, "uniform", "fisher"),
        "sharpness_half": sharpness_table(results, "half", "fisher"),
        "sharpness_timm": sharpness_table(results, "uniform", "fisher", "vit-timm"),
        "sharpness_hessian": sharpness_table(results, "uniform", "hutchinson"),
        "directional": directional_table(results, "uniform"),
        "directional_slow": directional_table(results, "uniform, a quarter of the rate"),
        "patches": patches_table(found, results),
        "settings": settings_table(found),
        "baseline": baseline_table(results),
        "runs": runs_table(results),
    }
    return filled(every) | {
        "answer": answer(found, results) or "Not answered yet: the runs are being made.",
        "state": state(found),
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
    drawn = draw_gains(gains(all_tuned(results)), HERE / "nats-won.png", over="tuned uniform")
    shown["sharpness_figure"] = image(
        "Average sharpness of every block", "sharpness-along-the-run.png", sharp
    )
    shown["gains_figure"] = image("Nats that every rule wins over tuned uniform", "nats-won.png", drawn)
    shown["machine"] = machine(results)
    # The templates name no page or figure that may not be there yet.
    shown["to_details"], shown["to_answer"] = "[details](details.md)", "[answer](README.md)"
    write_pages(HERE, shown)


if __name__ == "__main__":
    main()
