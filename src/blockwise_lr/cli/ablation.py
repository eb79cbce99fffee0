"""The command `blockwise-lr ablation`: switch blocks on one after another, and report the loss."""

from __future__ import annotations

from blockwise_lr.cli.sweep_flags import run_sweep_command


def run(arguments: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    run_sweep_command("ablation", arguments)
