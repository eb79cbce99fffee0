"""`blockwise-lr presets`: the names of the presets."""

from __future__ import annotations

from blockwise_lr.errors import UserError
from blockwise_lr.train.presets import PRESETS


def run(arguments: list[str]) -> None:
    if arguments in (["-h"], ["--help"]):
        print(
            "usage: blockwise-lr presets\n\nPrint the name of every preset, with its model, steps and text."
        )
        return
    if arguments:
        raise UserError(f"presets takes no arguments; got {' '.join(arguments)}")
    for name, config in PRESETS.items():
        model = config.model
        print(
            f"{name:<28} {model.family} {model.layers}x{model.hidden_size}, {config.steps:,} steps, {config.data.data}"
        )
