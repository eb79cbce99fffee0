"""`blockwise-lr sharpness`: how sharp each block of a model is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from blockwise_lr.analysis.measure_settings import MeasureConfig
from blockwise_lr.cli.flags import command_line, needs, parse
from blockwise_lr.cli.interrupts import at_work


@dataclass(frozen=True)
class SharpnessCommand:
    """How sharp each block of a model is: S(b) = tr(H_b) / #(b), with its standard error.

    Prints a table; writes sharpness.json, sharpness.png, layers.png, with --histogram density.png, and for a run with
    several checkpoints evolution.png. With --directional, of a run: the learning rate that each block could take, at
    the checkpoint of the highest learning rate and along the run, in directional.json and directional.png. In fp32,
    on the measure split of the text, which nothing is trained on.
    """

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A preset (at initialisation), a run's folder (every whole checkpoint), one checkpoint, or a Hugging Face
    model's folder or id."""
    config: Annotated[MeasureConfig, tyro.conf.OmitArgPrefixes]
    out: Path | None = None
    """Folder of the results; None: sharpness in the run's folder, otherwise runs/sharpness-NAME."""


def run(arguments: list[str]) -> None:
    parsed = parse(SharpnessCommand, "sharpness", arguments)
    needs("sharpness", "matplotlib")
    from rich.console import Console

    from blockwise_lr.analysis.measure_model import measure_model, tables_of

    at_work()
    command = command_line("sharpness", arguments)
    reports, out = measure_model(parsed.model, parsed.config, parsed.out, command=command)
    for table in tables_of(reports):
        Console().print(table)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir() if path.is_file()))}")
