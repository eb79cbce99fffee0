"""results/ratios/README.md's section on four times the steps, out of longer.json (benchmarks/longer.py)."""

from __future__ import annotations

from typing import Any

from blockwise_lr.compare.speedup import decayed_speedup, loss_gap

Runs = list[dict[str, Any]]


def section_on_longer(found: dict[str, Any], before: dict[str, Any] | None) -> str:
    """Every rule against uniform over more steps: the chosen runs of each, seed by seed, and what else was tried.

    Args:
        found: longer.json.
        before: the study of the same setting over fewer steps; None: no speed-up is told.
    """
    rules = {rule: runs_of(found["runs"], rule) for rule in dict.fromkeys(map(rule_of, found["runs"]))}
    chosen = {rule: each_seed(runs) for rule, runs in rules.items()}
    about = f"{found['date'][:10]}, {found['hardware'].get('cpu')} (`{found['command']}`)"
    lines = [f"`llama-2m` over {found['steps']} steps, {about}. Against tuned uniform at equal steps:", ""]
    lines += [won(rule, chosen, found["steps"], before) for rule in rules if rule != "uniform"]
    if before:
        lines += [
            "",
            "Losses fall less with every doubling, so the straight lines make the speed-ups over more steps a little "
            "too low and those over fewer a little too high.",
        ]
    lines += ["", "| ratios | base LR | warm-up | seed | tune loss | val loss |", "| --- " * 6 + "|"]
    lines += [row(run, rule) for rule, runs in rules.items() for run in runs]
    return "\n".join(lines)


def rule_of(run: dict[str, Any]) -> str:
    return str(run["point"]["rule"])


def runs_of(runs: Runs, rule: str) -> Runs:
    return [run for run in runs if rule_of(run) == rule]


def each_seed(runs: Runs) -> Runs:
    """The chosen run of each seed: the first ones."""
    return runs[: len({run["point"]["seed"] for run in runs})]


def row(run: dict[str, Any], name: str) -> str:
    p = run["point"]
    shown = ["diverged" if run[loss] is None else f"{run[loss]:.3f}" for loss in ("tune_loss", "val_loss")]
    return f"| {name} | {p['base_lr']:g} | {p['warmup']:.0%} | {p['seed']} | {' | '.join(shown)} |"


def won(rule: str, chosen: dict[str, Runs], steps: int, before: dict[str, Any] | None) -> str:
    """What a rule wins, and after how many steps it would end where uniform does."""
    gap = loss_gap(*([run["val_loss"] for run in chosen[of]] for of in ("uniform", rule)))
    interval = "" if gap.ci95 is None else f" ({gap.ci95[0]:+.3f} .. {gap.ci95[1]:+.3f})"
    text = f"- `{rule}` wins {gap.mean:+.3f} nats{interval}"
    ratios = chosen[rule][0]["point"].get("ratios", rule)
    text += f" with {ratios}." if ratios != rule else "."
    few = before["arms"].get(rule) if before and ratios == rule else None
    times = [] if few is None else speedups(few, chosen[rule], chosen["uniform"], steps)
    if few is None or before is None or not times:
        return text
    mean = sum(times) / len(times)
    then = next(each for each in before["comparisons"] if each["arm"] == rule)["speedup_decayed"]["value"]
    if then is None:
        return text
    return (
        f"{text} It would end where uniform does after {steps / mean:.0f} steps, by a line in the logarithm of the "
        f"steps between its own runs of {few['steps']} and {steps}: {mean:.2f}x (seeds {min(times):.2f}x to "
        f"{max(times):.2f}x), where the speed-up between fully decayed runs of {few['steps']} steps was {then:.2f}x."
    )


def speedups(few: dict[str, Any], fast: Runs, slow: Runs, steps: int) -> list[float]:
    """Of each seed; empty if one of them cannot be told."""
    ends = {seed["seed"]: seed["terminal_val_loss"] for seed in few["seeds"]}
    found = []
    for ours, theirs in zip(fast, slow, strict=True):
        losses = {few["steps"]: ends[ours["point"]["seed"]], steps: ours["val_loss"]}
        share = decayed_speedup(losses, theirs["val_loss"], steps)
        if share.bound != "exact" or share.value is None:
            return []
        found.append(1 / share.value)
    return found
