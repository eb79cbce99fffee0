"""Save the running sums of steps that are not logged yet with a checkpoint, and restore them.

Trainer resets its sum of losses when it resumes. SIGTERM can stop a run between two rows of metrics.jsonl. Without the
saved sums, the next row would be a mean over fewer steps than in an uninterrupted run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from blockwise_lr.files import write_json_atomic

if TYPE_CHECKING:
    from blockwise_lr.train.pretrain_trainer import PretrainTrainer

UNLOGGED = "unlogged.json"


class UnloggedSteps(TrainerCallback):
    """Saves Trainer's running sums with a checkpoint, and restores them when training begins.

    Args:
        trainer: the trainer that keeps the sums.
        run_dir: the run's folder.
    """

    def __init__(self, trainer: PretrainTrainer, run_dir: Path) -> None:
        self._trainer = trainer
        self._run_dir = run_dir

    def save(self, checkpoint: Path) -> None:
        """Write the sums of all ranks into `checkpoint`, unless the current step was just logged."""
        trainer = self._trainer
        since: int = trainer._globalstep_last_logged
        if since == trainer.state.global_step:
            return
        sums = trainer.accelerator.gather(trainer._tr_loss.reshape(1)).tolist()
        if trainer.is_world_process_zero():
            content = {"since_step": since, "loss_sums": sums, "skipped": trainer.skipped_since_row}
            write_json_atomic(checkpoint / UNLOGGED, content)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = self._run_dir / f"checkpoint-{state.global_step}" / UNLOGGED
        if not path.exists():  # at step 0, or after a logged step
            return
        content = json.loads(path.read_text(encoding="utf-8"))
        own = content["loss_sums"][args.process_index]
        self._trainer._tr_loss += torch.tensor(own, device=args.device)
        self._trainer._globalstep_last_logged = content["since_step"]
        self._trainer.skipped_since_row = content["skipped"]
