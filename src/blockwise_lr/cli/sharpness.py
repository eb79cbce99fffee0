"""The command `blockwise-lr sharpness`: measure the sharpness of each block of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from blockwise_lr.analysis.measure_settings import MeasureConfig
from blockwise_lr.cli.flags import command_line, needs, parse
from blockwise_lr.cli.interrupts import end_startup


@dataclass(frozen=True)
class SharpnessCommand:
    """Measure the sharpness of each block of a model, S(b) = tr(H_b) / #(b), with its standard error.

    The command prints a table and writes sharpness.json, sharpness.png and layers.png. It adds density.png with
    --histogram, and evolution.png for a run with several checkpoints. With --directional, it measures instead which
    learning rate each block of a run could take, and writes directional.json and directional.png. All measurements
    are in fp32, on the measure split of the text, on which nothing is trained.
    """

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A preset (measured at initialisation), a run's folder (every complete checkpoint), one checkpoint, or a
    Hugging Face model's folder or id."""
    config: Annotated[MeasureConfig, tyro.conf.OmitArgPrefixes]
    out: Path | None = None
    """Folder for the results. None: the folder sharpness of the run, otherwise runs/sharpness-NAME."""


def run(arguments: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    parsed = parse(SharpnessCommand, "sharpness", arguments)
    needs("sharpness", "matplotlib")
    from rich.console import Console

    from blockwise_lr.analysis.measure_model import lines_of, measure_model, tables_of

    end_startup()
    command = command_line("sharpness", arguments)
    reports, out = measure_model(parsed.model, parsed.config, parsed.out, command=command)
    for table in tables_of(reports):
        Console().print(table)
    for line in lines_of(reports):
        print(line)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir() if path.is_file()))}")
