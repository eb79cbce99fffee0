"""The callback that ends a lost trial during its training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.tune.early_end import EarlyEnd


class TrialEnded(Exception):  # noqa: N818 (ending a lost trial is no error)
    """A trial was ended because it was clearly lost.

    Args:
        step: the step after which it ended.
        gap: how far it was above the best finished run, in nats.
        loss: its training loss at this step, which metrics.jsonl does not have.
    """

    def __init__(self, step: int, gap: float, loss: float) -> None:
        super().__init__(f"ended at step {step}, {gap:.3f} nats above the best run")
        self.step = step
        self.gap = gap
        self.loss = loss


class EndIfLost(TrainerCallback):
    """Raises TrialEnded when the rule says that the run is lost.

    Args:
        rule: the rule.
        best: training loss by step of the best finished run.
        metrics: the run's metrics.jsonl, which has the losses from before a resume.
    """

    def __init__(self, rule: EarlyEnd, best: Mapping[int, float], metrics: Path) -> None:
        self._rule, self._best, self._metrics = rule, best, metrics
        self._losses: dict[int, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = read_metrics(self._metrics)
        self._losses = {row["step"]: row["train_loss"] for row in rows if row["train_loss"] is not None}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        self._losses[state.global_step] = logs["loss"]
        if state.global_step < state.max_steps and self._rule.lost(self._losses, self._best, state.max_steps):
            gap = self._rule.gap(self._losses, self._best) or 0.0
            raise TrialEnded(state.global_step, gap, logs["loss"])
