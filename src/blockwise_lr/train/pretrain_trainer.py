"""BlockwiseTrainer for pre-training, with a fixed data order, one metrics file and sealed checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sized
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, Sampler, SequentialSampler

from blockwise_lr.checkpoints import manifest
from blockwise_lr.errors import NonFiniteLossError, StorageError
from blockwise_lr.files import storing
from blockwise_lr.fp32 import fp32_precision
from blockwise_lr.integrations.transformers import BlockwiseTrainer
from blockwise_lr.optim.gradients import reduce_sharded
from blockwise_lr.train import resuming
from blockwise_lr.train.deferred_guard import DeferredGuard, can_defer
from blockwise_lr.train.evaluate_loss import evaluate_loss
from blockwise_lr.train.metrics import MetricsFile
from blockwise_lr.train.unlogged import UnloggedSteps


class PretrainTrainer(BlockwiseTrainer):
    """The trainer of `blockwise-lr train`.

    Args:
        metrics: the file that receives every logged step; None on all ranks but 0.
        run_dir: the run's folder, for checkpoints.
        keep_checkpoints: number of complete checkpoints to keep.
        tokens_per_step: tokens in one optimizer step, over all ranks.
        autocast_bf16: run the forward pass under bf16 autocast; weights and evaluation stay in fp32. Trainer's own
            ``bf16=True`` patches the model's forward, so evaluation would use it too, and copies the logits again.
        tf32: compute the fp32 products of training steps in TF32, on a GPU. Evaluation stays in full fp32.
        guard: handles losses and gradients that are not finite.
    """

    def __init__(
        self,
        *args: Any,
        metrics: MetricsFile | None,
        run_dir: Path,
        keep_checkpoints: int,
        tokens_per_step: int,
        autocast_bf16: bool,
        tf32: bool,
        guard: DeferredGuard,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._guard = guard
        self.skipped_since_row = 0
        self.val_loss: float | None = None  # of the last evaluation, on every rank
        self._row_before = 0  # step of the last row: Trainer updates its own before it calls `log`
        self._unlogged = UnloggedSteps(self, run_dir)
        self.add_callback(self._unlogged)
        self._metrics = metrics
        self._run_dir = run_dir
        self._keep_checkpoints = keep_checkpoints
        self.tokens_per_step = tokens_per_step
        self._autocast_bf16 = autocast_bf16
        self._tf32 = tf32
        self._started = time.monotonic()
        self._pending: dict[str, Any] | None = None
        # All windows have one length, so the mean of micro-batch means is exact without counting tokens.
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        # TrainingStream fixes the order. Trainer's own sampler would shuffle it again.
        return SequentialSampler(
            cast("Sized", self.train_dataset if train_dataset is None else train_dataset)
        )

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> AbstractContextManager[Any]:
        if not self._autocast_bf16:
            return nullcontext()
        # Autocast drops the weights it has cast only where the outermost context ends, which may be the caller's: every
        # step would use the weights of the first. A pass casts a weight once, or twice if it is tied.
        return torch.autocast(self.args.device.type, torch.bfloat16, cache_enabled=False)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Trainer's version visits all parameters at every micro-batch, for a number that only its log shows.
        return 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as BlockwiseTrainer does, after discarding the state of an interrupted training."""
        self._guard.begin()
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._guard.before_micro_batch(self._tr_loss)
        with fp32_precision("tf32") if self._tf32 else nullcontext():
            return super().training_step(*args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Do nothing: _get_grad_norm clips, and Trainer calls it at every step."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> torch.Tensor:
        """Clip the gradient, and return its norm from before clipping.

        torch's ``clip_grad_norm_`` first computes the norm and then scales. Scaling by a NaN would spread it over all
        parameters, so the guard looks at the norm in between. On a GPU, a fused optimizer skips the step by itself, and
        the host learns of it when the run logs. For other optimizers, this check causes one host sync a step.
        """
        self._row_before = self._globalstep_last_logged
        optimizer = self._inner_optimizer
        groups = optimizer.param_groups
        if self.auto is None and can_defer(optimizer, self.args.device, self.accelerator.distributed_type):
            return self._defer(model, optimizer)
        if self._clipping is not None:
            norm = self._clipping.clip(model, groups, self.state.global_step, leave_nonfinite=True)
            finite = math.isfinite(norm)
        else:
            parameters = [p for p in model.parameters() if p.grad is not None]
            (norm,) = reduce_sharded(
                [nn.utils.get_total_norm([cast("torch.Tensor", p.grad) for p in parameters])]
            )
            finite = math.isfinite(norm)
            if finite and self.args.max_grad_norm > 0:
                nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        if finite:
            self._guard.after_step()
        else:
            self._guard.stop_or_skip(model, groups, self._tr_loss, self.state.global_step + 1)
            self.skipped_since_row += 1
        return norm

    @property
    def _inner_optimizer(self) -> Optimizer:
        """The optimizer inside accelerate's wrapper."""
        return cast("Optimizer", getattr(self.optimizer, "optimizer", self.optimizer))

    def _defer(self, model: nn.Module, optimizer: Optimizer) -> torch.Tensor:
        """Do the same without waiting for the device."""
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = self._guard.defer(optimizer, parameters, self._tr_loss, self.state.global_step + 1)
        if self._clipping is not None:
            self._clipping.clip(model, optimizer.param_groups, self.state.global_step)
        elif self.args.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save or self._guard.is_full:
            self.skipped_since_row += self._guard.read(self._inner_optimizer.param_groups)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    @property
    def _warns_of_gradients(self) -> bool:
        return False  # the guard reports them

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute the validation loss in fp32, and write the pending row of metrics.jsonl with it."""
        windows = cast("Dataset[dict[str, torch.Tensor]]", self.eval_dataset)
        batch_size = self.args.per_device_eval_batch_size
        self.val_loss = loss = evaluate_loss(cast("nn.Module", self.model), windows, batch_size=batch_size)
        if self._pending:
            self._write({**self._pending, "val_loss": loss})
        if not math.isfinite(loss):  # raised before this step's checkpoint is saved
            raise NonFiniteLossError(self.state.global_step)
        metrics = {"eval_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        skipped = self.skipped_since_row
        if "loss" in logs and skipped:
            # Trainer divides by all steps since the last row, but the sum has no losses of skipped steps.
            steps = self.state.global_step - self._row_before
            logs["loss"] = logs["loss"] * steps / (steps - skipped) if steps > skipped else math.nan
        super().log(logs, start_time)
        if "loss" not in logs:
            return
        self.skipped_since_row = 0
        row = {
            "step": self.state.global_step,
            "tokens": self.state.global_step * self.tokens_per_step,
            "train_loss": logs["loss"],
            "val_loss": None,
            "lr": _by_block(logs, "lr/"),
            **({"ratios": ratios} if (ratios := _by_block(logs, "ratio/")) else {}),
            "grad_norm": logs.get("grad_norm"),
            **({"grad_norms": norms} if (norms := _by_block(logs, "grad_norm/")) else {}),
            **({"skipped": skipped} if skipped else {}),
            "seconds": round(self.seconds, 3),
        }
        if not math.isfinite(logs["loss"]) and not skipped:
            self._write(row)
            raise NonFiniteLossError(self.state.global_step)
        if self.control.should_evaluate:
            self._pending = row
        else:
            self._write(row)

    @property
    def seconds(self) -> float:
        """Seconds that this run has taken, including those before a resume."""
        before = self._metrics.seconds if self._metrics else 0.0
        return before + time.monotonic() - self._started

    def _write(self, row: dict[str, Any]) -> None:
        self._pending = None
        if self._metrics:
            self._metrics.append(row)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with resuming.loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise errors where Trainer would warn."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or ()
        resuming.check_weights(load_result.missing_keys, load_result.unexpected_keys, tied)

    def _tell(self, text: str) -> None:
        """Print nothing: `run_folder` has already compared the configurations and reported differences."""

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None:
            return
        with resuming.loading(checkpoint_folder):
            resuming.check_states(checkpoint_folder)
            super()._load_optimizer_and_scheduler(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        target = self._run_dir / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero() and target.exists():
            # A run that was killed while saving left this folder. Two saves must not mix in one folder.
            manifest.remove(target)
        _barrier()
        try:
            with storing(target):
                super()._save_checkpoint(model, trial)
                self._unlogged.save(target)
                _barrier()
                if self.is_world_process_zero():
                    if self._metrics:
                        self._metrics.sync()
                    manifest.seal(target)
        except StorageError:
            # An incomplete checkpoint is useless and takes space on a full disk.
            if self.is_world_process_zero():
                with contextlib.suppress(OSError):
                    manifest.remove(target)
            raise
        if self.is_world_process_zero():
            manifest.rotate(self._run_dir, self._keep_checkpoints, newest=target)


def _by_block(logs: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in logs.items() if name.startswith(prefix)}


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
