"""What has been summed since the last row of metrics.jsonl, for a checkpoint that lies between two rows.

Trainer starts its sum of losses anew on resuming. After SIGTERM, which stops a run at any step, the next row would then
be a mean over fewer steps than in a run that was not stopped.
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
    """Saves those sums with a checkpoint, and takes them up again.

    Args:
        trainer: whose sums they are.
        run_dir: the run's folder.
    """

    def __init__(self, trainer: PretrainTrainer, run_dir: Path) -> None:
        self._trainer = trainer
        self._run_dir = run_dir

    def save(self, checkpoint: Path) -> None:
        """Write them into `checkpoint`, those of every process; nothing at a step that was logged."""
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
        if not path.exists():  # also at step 0
            return
        content = json.loads(path.read_text(encoding="utf-8"))
        own = content["loss_sums"][args.process_index]
        self._trainer._tr_loss += torch.tensor(own, device=args.device)
        self._trainer._globalstep_last_logged = content["since_step"]
        self._trainer.skipped_since_row = content["skipped"]
