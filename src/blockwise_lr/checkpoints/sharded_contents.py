"""The contents of a sharded checkpoint: tensors and group settings by parameter name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from blockwise_lr.blocks import canonical_name
from blockwise_lr.distributed import is_sharded
from blockwise_lr.errors import UserError
from blockwise_lr.optim.saved_groups import has_moving_ratios
from blockwise_lr.optimizers.adam_mini import AdamMini
from blockwise_lr.optimizers.adam_mini_sharded import sharded_zeros


def group_differences(saved: Mapping[str, Mapping[str, Any]], optimizer: Optimizer) -> Iterator[str]:
    """Yield each difference between the saved groups and those of the optimizer, in words.

    Args:
        saved: canonical parameter name -> the saved settings of its group.
        optimizer: the optimizer to load into.
    """
    reported: set[str] = set()
    names = set()
    moved = has_moving_ratios(optimizer.param_groups) and has_moving_ratios(list(saved.values()))
    for group in named_groups(optimizer):
        for name in map(canonical_name, group["names"]):
            names.add(name)
            if name not in saved:
                yield f"{name} ({group['block']}) was not trained there and is here"
                continue
            old = saved[name]
            if old["block"] != group["block"]:
                yield f"{name} was in block {old['block']} there and is in {group['block']} here"
            for key in ("decay",) if moved else ("lr_ratio", "initial_lr", "decay"):
                if old[key] != group.get(key):
                    text = f"{key} of {group['block']} is {old[key]} there and {group.get(key)} here"
                    if text not in reported:
                        reported.add(text)
                        yield text
    for name in saved:
        if name not in names:
            yield f"{name} ({saved[name]['block']}) was trained there and is not here"


def check_model(folder: Path, targets: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
    """Check that a model's tensors have the names and shapes of a checkpoint's.

    Args:
        folder: the checkpoint, for messages.
        targets: the model's tensors under their stored names ``model.NAME``.
        stored: the descriptions of the checkpoint's tensors.

    Raises:
        UserError: a name or a shape differs.
    """
    there = {name: tuple(about.size) for name, about in stored.items() if name.startswith("model.")}
    here = {name: tuple(value.shape) for name, value in targets.items()}
    for name in sorted(there | here):
        if there.get(name) != here.get(name):
            raise UserError(
                f"{folder} is of another model: {name.removeprefix('model.')} has shape "
                f"{there.get(name, 'none')} there and {here.get(name, 'none')} here; expected the same model, and "
                "split_fused called as it was then"
            )


def use_stored_dtypes(model: nn.Module, stored: Mapping[str, Any]) -> None:
    """Give a model's tensors the dtypes of a checkpoint's, in place: loading would round fp32 weights into bf16.

    Args:
        model: a model that was built from the configuration, whose dtype may be another than that of the training.
        stored: the descriptions of the checkpoint's tensors, under their stored names ``model.NAME``.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        about = stored.get(f"model.{canonical_name(name)}")
        if isinstance(about, TensorStorageMetadata):
            tensor.data = tensor.data.to(about.properties.dtype)


def load_target(
    key: str, about: TensorStorageMetadata, parameter: nn.Parameter, optimizer: Optimizer
) -> Tensor:
    """Allocate the tensor that a moment is loaded into, sharded as the optimizer keeps it."""
    dtype = about.properties.dtype
    if isinstance(optimizer, AdamMini) and key == "exp_avg_sq" and is_sharded(parameter):
        return sharded_zeros(parameter, about.size, dtype)
    # The shape () tells a step from a moment only if the parameter has another one.
    if about.size == parameter.shape and (about.size or key != "step"):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    counts = not about.size and not (group.get("fused") or group.get("capturable"))
    return torch.empty(about.size, dtype=dtype, device="cpu" if counts else parameter.device)


def state_tensor(optimizer: Optimizer, name: str, key: str, value: Any) -> Tensor:
    """Return one value of an optimizer's state as a tensor.

    Args:
        optimizer: the optimizer, for the message.
        name, key: the parameter's name and the value's key in its state, for the message.
        value: the value.

    Raises:
        UserError: `value` is neither a tensor nor a number.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, int | float):
        return torch.tensor(value)
    raise UserError(
        f"{type(optimizer).__name__} keeps {type(value).__name__} under {key!r} in the state of {name}; a sharded "
        "checkpoint holds tensors and numbers: choose another optimizer, or without sharding save its state_dict() "
        "with torch.save"
    )


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers with their canonical names; of tied parameters, only the first."""
    for name, parameter in model.named_parameters():
        yield canonical_name(name), parameter.detach()
    skipped = {
        f"{path}.{leaf}" if path else leaf
        for path, module in model.named_modules()
        for leaf in module._non_persistent_buffers_set
    }
    for name, buffer in model.named_buffers():
        if name not in skipped:
            yield canonical_name(name), buffer


def named_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the groups of an optimizer.

    Raises:
        UserError: a group has no names.
    """
    if not all("names" in group for group in optimizer.param_groups):
        raise UserError("a group of the optimizer has no names: make the groups with param_groups(model, lr)")
    return optimizer.param_groups


def parameters_of(optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the optimizer's parameters with their canonical names."""
    for group in named_groups(optimizer):
        for name, parameter in zip(group["names"], group["params"]):
            yield canonical_name(name), parameter


def group_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's names and scalar hyperparameters, without lists by position such as Adam-mini's partitions."""
    plain = {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
    hyperparameters = {
        key: value for key, value in plain.items() if isinstance(value, str | float | int | tuple | None)
    }
    return {**hyperparameters, "names": group["names"]}
