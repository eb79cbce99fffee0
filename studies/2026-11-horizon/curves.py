"""The val loss along the tuned runs of one length: when each rule's lead comes, and when it goes."""

from __future__ import annotations

from pathlib import Path

from rules import COMPARED
from tuned import MODELS, Tuned
from tuning import Results

from blockwise_lr import drawing

SHAPE, STEPS = "llama-600k", 4800
"""What is drawn: the longest runs of which more than two rules are tuned."""


def draw_curves(found: dict[tuple[str, int, str], Tuned], results: Results, path: Path) -> bool:
    """Draw the val loss at seed 0 against the steps, a line a rule; return whether there is anything to compare."""
    arms = {rule: found[SHAPE, STEPS, rule].arm for rule in COMPARED if (SHAPE, STEPS, rule) in found}
    if len(arms) < 2 or "uniform" not in arms:
        return False
    with drawing.figure((6.4, 4.0)) as made:
        axes = made.subplots()
        for number, (rule, arm) in enumerate(arms.items()):
            run = results.runs[arm.name]
            steps, losses = zip(*run["curve"], (STEPS, run["val_loss"]))
            axes.plot(steps, losses, label=rule, **drawing.series_style(number) | {"linestyle": "-"})
        axes.set_ylim(top=5.3)
        axes.set_xlabel(f"steps, of {STEPS:,} in all".replace(",", " "))
        axes.set_ylabel("val loss in nats")
        axes.set_title(f"LLaMA of {MODELS[SHAPE]} parameters, tuned, one seed")
        axes.legend()
        drawing.save(made, path)
    return True
