"""Save and load sharded checkpoints of fully_shard training, which any number of ranks can resume from.

Tensors are stored in the split layout, because the shards of a split weight cannot be merged. They are stored under
parameter names, because positions in the groups change with the groups.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from blockwise_lr.blocks import canonical_name
from blockwise_lr.checkpoints.dcp_reader import SafeReader
from blockwise_lr.checkpoints.manifest import LAYOUT, problem_with, seal
from blockwise_lr.checkpoints.sharded_contents import (
    check_model,
    group_differences,
    group_settings,
    load_target,
    named_groups,
    parameters_of,
    state_tensor,
    weights_of,
)
from blockwise_lr.errors import StorageError, UserError
from blockwise_lr.files import storing, write_json_atomic
from blockwise_lr.optim.blockwise_schedule import BlockwiseSchedule
from blockwise_lr.optim.scheduler_scaling import is_scaled

__all__ = ["load_sharded", "save_sharded"]


def save_sharded(
    folder: str | Path, model: nn.Module, optimizer: Optimizer, schedule: BlockwiseSchedule | None = None
) -> None:
    """Save a model and its optimizer. Every rank calls this function and writes its own shards.

    The folder has its name only when it is complete. Until then, its name begins with a dot.

    Args:
        folder: ``.../checkpoint-STEP``, on a disk that all ranks share; it must not exist.
        model: the model after ``split_fused`` and ``fully_shard``, or not sharded at all.
        optimizer: an optimizer on groups of :func:`blockwise_lr.param_groups`.
        schedule: a schedule of this library; its step and its settings are saved.

    Raises:
        UserError: the folder exists or is not named checkpoint-STEP, a group has no names, the state of the optimizer
            is not made of tensors and numbers, or the schedule is not of this library.
        StorageError: a rank cannot write its files. All ranks raise the error, and no folder appears.

    Example:
        >>> save_sharded("run/checkpoint-100", model, optimizer, schedule)  # doctest: +SKIP
    """
    folder = Path(folder)
    if not (folder.name.startswith("checkpoint-") and folder.name[11:].isdigit()):
        raise UserError(
            f"the folder is named {folder.name}; expected checkpoint-STEP, such as checkpoint-100"
        )
    _check_schedule(schedule)
    groups = [group_settings(group) for group in named_groups(optimizer)]
    tensors = {f"model.{name}": value for name, value in weights_of(model)}
    for name, parameter in parameters_of(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = state_tensor(optimizer, name, key, value)
    hidden = folder.with_name(f".{folder.name}")

    def begin() -> None:
        if folder.exists():
            raise UserError(f"{folder} is there already: choose another, or remove it")
        shutil.rmtree(hidden, ignore_errors=True)  # an interrupted save may have left it
        hidden.mkdir(parents=True)

    def finish() -> None:
        step = None if schedule is None else schedule.last_epoch
        settings = None if schedule is None else schedule.settings()
        write_json_atomic(
            hidden / LAYOUT, {"groups": groups, "schedule": step, "schedule_settings": settings}
        )
        # The export needs the config of a transformers model.
        inner = getattr(model, "module", model)  # DDP keeps its model there
        config: Any = getattr(model, "config", None) or getattr(inner, "config", None)
        if hasattr(config, "save_pretrained"):  # other models may keep anything under this name
            config.save_pretrained(hidden)
        seal(hidden)
        hidden.rename(folder)

    _run_on_rank_0(begin, hidden)
    try:
        save(cast("dict[str, Any]", tensors), checkpoint_id=hidden, no_dist=not dist.is_initialized())
    except CheckpointException as error:  # a BaseException, which torch raises on every rank if one fails
        raise StorageError(hidden, str(next(iter(error.failures.values()))[0])) from error
    _run_on_rank_0(finish, hidden)


def load_sharded(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: BlockwiseSchedule | None = None,
    *,
    changed: Literal["error", "adopt"] = "error",
) -> None:
    """Load a checkpoint of :func:`save_sharded`. Every rank calls this function; their number may have changed.

    The groups are compared with the saved ones: learning rates, ratios, blocks, and which parameters are trained.
    Without differences, all saved hyperparameters of the groups are restored, including betas and weight decay, as
    ``load_state_dict`` does.

    Args:
        folder: the checkpoint folder.
        model: the same model, split as it was when it was saved, and sharded in any way. Changed in place.
        optimizer: a new optimizer of the same kind, before its first step. Its moments are found by parameter name.
        schedule: a new schedule. It continues at the saved step with its own settings; a warning names settings that
            have changed.
        changed: what to do if the groups differ. "error" raises an error that names the first differences. "adopt"
            keeps the new groups, and loads the saved moments of parameters that have them. Ratios that
            :class:`blockwise_lr.AutoRatios` has moved are no difference for an optimizer that has one.

    Raises:
        UserError: the checkpoint is not complete, is of another model or optimizer, or has other groups.

    Example:
        >>> load_sharded("run/checkpoint-100", model, optimizer, schedule)  # doctest: +SKIP
    """
    folder = Path(folder)
    _check_schedule(schedule)
    if problem := problem_with(folder):
        raise UserError(f"{folder} is not a complete checkpoint: {problem}; choose another checkpoint")
    layout = json.loads((folder / LAYOUT).read_text(encoding="utf-8"))
    saved = {name: group for group in layout["groups"] for name in map(canonical_name, group["names"])}
    differences = list(group_differences(saved, optimizer))
    if differences and changed == "error":
        raise UserError(
            f"{folder} was saved with other groups: {'; '.join(differences[:3])}"
            f"{f'; and {len(differences) - 3} more' if len(differences) > 3 else ''}; make the groups as they were, or "
            'load with changed="adopt" to go on with the new ones'
        )
    stored = SafeReader(folder).read_metadata().state_dict_metadata
    targets: dict[str, Any] = {f"model.{name}": value for name, value in weights_of(model)}
    check_model(folder, targets, stored)
    # First the settings: the saved `fused` and `capturable` decide on which device steps are counted.
    if not differences:
        _restore_settings(optimizer, saved)
    states: dict[Tensor, Any] = {}
    known = dict(parameters_of(optimizer))
    for full, about in stored.items():
        if full.startswith("optimizer."):
            _, key, name = full.split(".", 2)
            if name in known and isinstance(about, TensorStorageMetadata):
                target = load_target(key, about, known[name], optimizer)
                states.setdefault(known[name], {})[key] = targets[full] = target
    load(targets, storage_reader=SafeReader(folder), no_dist=not dist.is_initialized())
    optimizer.state.update(states)
    if schedule is not None and layout["schedule"] is not None:
        if settings := layout.get("schedule_settings"):  # earlier versions saved the step alone
            try:
                schedule.load_state_dict({**settings, "last_epoch": layout["schedule"]})
            except ValueError as error:
                raise UserError(f"{folder}: {error}") from None
        schedule.resume_at(layout["schedule"])


def _restore_settings(optimizer: Optimizer, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Set the hyperparameters of each group to those of the saved group of its parameters."""
    for group in optimizer.param_groups:
        for key, value in saved[canonical_name(group["names"][0])].items():
            # A tensor is filled in place, because a compiled step may hold a reference to it.
            if isinstance(here := group.get(key), Tensor):
                here.fill_(value)
            elif key != "names":  # saved names may have a wrapper's prefix
                group[key] = tuple(value) if isinstance(here, tuple) else value


def _check_schedule(schedule: object) -> None:
    if is_scaled(schedule):
        raise UserError(
            "a schedule of scale_by_block has more to save than its step; expected one of this library, or None: "
            "leave the schedule out here, and save its state_dict() with torch.save"
        )


def _run_on_rank_0(job: Callable[[], None], path: Path) -> None:
    """Run a job on rank 0 and raise its error on all ranks, which would otherwise wait forever."""
    failed: list[Exception | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            with storing(path):
                job()
        except Exception as error:
            failed = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(failed)
        dist.barrier()  # rank 0 must not exit before the others have received its broadcast
    if failed[0] is not None:
        raise failed[0]
