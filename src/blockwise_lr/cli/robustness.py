"""The command `blockwise-lr robustness`: scale every ratio up and down, and report the valley."""

from __future__ import annotations

from blockwise_lr.cli.sweep_flags import run_sweep_command


def run(arguments: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    run_sweep_command("robustness", arguments)
