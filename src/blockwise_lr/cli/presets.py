"""The command `blockwise-lr presets`: list the presets."""

from __future__ import annotations

from blockwise_lr.errors import UserError
from blockwise_lr.train.presets import PRESETS


def run(arguments: list[str]) -> None:
    """Run the command; it takes no arguments."""
    if arguments in (["-h"], ["--help"]):
        print("usage: blockwise-lr presets\n\nList every preset with its model, number of steps and text.")
        return
    if arguments:
        raise UserError(f"presets takes no arguments; got {' '.join(arguments)}")
    for name, config in PRESETS.items():
        model = config.model
        print(
            f"{name:<28} {model.family} {model.layers}x{model.hidden_size}, {config.steps:,} steps, {config.data.data}"
        )
