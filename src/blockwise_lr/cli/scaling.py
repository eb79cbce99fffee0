"""The command `blockwise-lr scaling`: fit power laws to finished comparisons of several sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from blockwise_lr.cli.flags import command_line, needs, parse
from blockwise_lr.cli.interrupts import end_startup


@dataclass(frozen=True)
class ScalingCommand:
    """Fit L(N) = E + A N^-alpha, the loss against the number of parameters, to every arm of finished comparisons.

    Give the folders of at least four sizes, written by compare (or by train: one folder for each run). The report has
    the laws with intervals, and how many times as many parameters the baseline needs for the loss of each other arm.
    Nothing is trained.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of comparisons or runs. All need the same text, tokenizer and context."""
    out: Path = Path("runs") / "scaling"
    """Folder for the report."""
    arms: tuple[str, ...] = ()
    """Arms to fit, the baseline first, by their names in compare.json (OPTIMIZER:RATIOS for runs). Empty: all arms that
    every size has."""
    parameters: Literal["all", "non-embedding"] = "all"
    """Parameters that count as the size. Embeddings and output head are a large part of small models."""


def run(arguments: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    parsed = parse(ScalingCommand, "scaling", arguments)
    needs("scaling", "scipy", "matplotlib", "jinja2")
    from blockwise_lr.compare.printed_answer import print_answer
    from blockwise_lr.compare.scaling_report import fit_sizes

    end_startup()
    content = fit_sizes(
        parsed.folders,
        parsed.out,
        arms=parsed.arms,
        counted=parsed.parameters,
        command=command_line("scaling", arguments),
    )
    print_answer(content, parsed.out)
