"""Split a fused weight into parameters: compute it from its parts, but save and load the original layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils.hooks import RemovableHandle

from blockwise_lr.blocks.layout import Layout
from blockwise_lr.blocks.write_through import in_forward, write_through

_STATE = "_blockwise_split"


class FusedWeight(nn.Module):
    """The parametrization of a split weight: `weight = cat(parts, dim)`.

    It holds a :class:`~blockwise_lr.blocks.layout.Layout` as names and sizes, and the dimension of the parts.

    Args:
        part_names: the parts in order, e.g. ("q", "k", "v").
        sizes: width of each part along `dim`. They may differ (grouped-query attention).
        dim: 0 for the rows of a Linear or a bias, 1 for the columns of transformers' Conv1D.
        repeats: how often the sequence of parts repeats in the weight. Default: 1.
    """

    def __init__(
        self, part_names: tuple[str, ...], sizes: tuple[int, ...], dim: int, repeats: int = 1
    ) -> None:
        super().__init__()
        self.part_names, self.sizes, self.dim, self.repeats = part_names, sizes, dim, repeats

    @property
    def layout(self) -> Layout:
        """The layout of the weight."""
        return Layout(tuple(zip(self.part_names, self.sizes)), self.repeats)

    def forward(self, *parts: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.fuse(parts)
        # A parameter requires gradients even under no_grad, and torch.matmul chooses its kernel by that. Without this
        # context, evaluation on the strided inputs of nn.MultiheadAttention would differ in the last bits.
        with torch.inference_mode(False), torch.enable_grad():
            return self.fuse(parts)

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the weight in its original layout."""
        if self.repeats == 1:
            return torch.cat(list(parts), dim=self.dim)
        stretches = [torch.unflatten(part, self.dim, (self.repeats, -1)) for part in parts]
        return torch.cat(stretches, dim=self.dim + 1).flatten(self.dim, self.dim + 1)

    def right_inverse(self, fused: Tensor) -> tuple[Tensor, ...]:
        """Return copies of the parts of a weight."""
        # Clone, so that no part has the fused strides, shares the fused storage with another part or keeps it alive.
        return tuple(each.clone(memory_format=torch.contiguous_format) for each in self.split(fused.detach()))

    def split(self, fused: Tensor) -> list[Tensor]:
        """Return the parts of a weight in its original layout. Some share its memory."""
        stretches = torch.unflatten(fused, self.dim, (self.repeats, -1))
        lengths = [size // self.repeats for size in self.sizes]
        parts = torch.split(stretches, lengths, dim=self.dim + 1)
        return [part.flatten(self.dim, self.dim + 1) for part in parts]


class SplitWeight:
    """The weight of a module and its parts, for writes from :mod:`blockwise_lr.blocks.write_through`.

    After `merge_fused` it stands for the merged weight.

    Args:
        module: the module that owns the weight.
        leaf: the attribute name of the weight.
    """

    def __init__(self, module: nn.Module, leaf: str) -> None:
        self.module, self.leaf, self.name = (
            module,
            leaf,
            f"{type_before_parametrizations(module).__name__}.{leaf}",
        )

    @property
    def fused(self) -> FusedWeight:
        """The parametrization that computes the weight."""
        found: FusedWeight = getattr(self.module, "parametrizations")[self.leaf][0]  # noqa: B009
        return found

    def tensors(self) -> list[Tensor]:
        """Return the parts, or the weight alone if it is merged."""
        return parts_of(self.module, self.leaf) if self._is_split else [getattr(self.module, self.leaf)]

    def whole(self) -> Tensor:
        """Return the weight, gathered from all processes if it is sharded."""
        tensors = [gathered(tensor) for tensor in self.tensors()]
        return self.fused.fuse(tensors) if self._is_split else tensors[0]

    def assign(self, value: Tensor) -> None:
        """Copy a whole weight into the parts. Parts take over its dtype and device.

        Raises:
            ValueError: the weight has another shape.
        """
        parts = self.tensors()
        shape = list(parts[0].shape)
        if self._is_split:
            shape[self.fused.dim] = sum(self.fused.sizes)
        if list(value.shape) != shape:
            raise ValueError(
                f"{self.name} has shape {tuple(shape)} and is split; it cannot become one of shape "
                f"{tuple(value.shape)}: call merge_fused(model) first, and split_fused after"
            )
        parts_of_value = self.fused.split(value.detach()) if self._is_split else [value.detach()]
        for part, each in zip(parts, parts_of_value):
            if any_sharded([part]):
                part.copy_(_sharded_as(part, each))
            elif (part.dtype, part.device) == (each.dtype, each.device):
                part.copy_(each)
            else:
                part.data = each.clone(memory_format=torch.contiguous_format)

    def require_grad(self, flag: bool) -> None:
        """Set `requires_grad` of the parts."""
        for part in self.tensors():
            part.requires_grad_(flag)

    @property
    def _is_split(self) -> bool:
        """Whether the weight is still split. A tensor may outlive merge_fused."""
        return parametrize.is_parametrized(self.module, self.leaf)


@dataclass(frozen=True)
class SplitState:
    """What a split module remembers to undo the split.

    Args:
        order: names of all the module's own parameters, in their original order.
        leaves: names of the parameters that are split.
        handles: handles of the state_dict hooks.
    """

    order: tuple[str, ...]
    leaves: tuple[str, ...]
    handles: tuple[RemovableHandle, ...]


def split_state(module: nn.Module) -> SplitState | None:
    """Return the state that :func:`split_module` stored in a module; None if it is not split."""
    state: SplitState | None = module.__dict__.get(_STATE)
    return state


def split_layout(module: nn.Module, leaf: str) -> Layout | None:
    """Return the layout of a split weight; None if it is not split."""
    state = split_state(module)
    if state is None or leaf not in state.leaves:
        return None
    return SplitWeight(module, leaf).fused.layout


def split_module(module: nn.Module, fused: dict[str, FusedWeight]) -> None:
    """Split some of a module's own parameters in place, and make its state dict keep the original layout.

    Args:
        module: the module.
        fused: name of each parameter to split -> the parametrization that computes it.
    """
    order = tuple(module._parameters)
    for leaf, parametrization in fused.items():
        parametrize.register_parametrization(module, leaf, parametrization)
        _make_writable(module, leaf)
    handles = (
        module.register_state_dict_post_hook(_merge_on_save),  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_split_on_load),  # type: ignore[no-untyped-call]
    )
    module.__dict__[_STATE] = SplitState(order, tuple(fused), handles)


def _make_writable(module: nn.Module, leaf: str) -> None:
    """Make reads of the weight outside forward passes writable, and assignments to it reach the parts."""
    made_by_torch: Any = type(module)  # torch made this class for the module; its deep copies share it
    computed: Any = made_by_torch.__dict__[leaf]

    def read(self: nn.Module) -> Tensor:
        if torch.compiler.is_compiling() or in_forward() or not _is_plainly_split(self, leaf):
            plain: Tensor = computed.fget(self)
            return plain
        parts = parts_of(self, leaf)
        if any_sharded(parts) and not parts[0].is_meta:
            value: Tensor = SplitWeight(self, leaf).fused(*(gathered(part) for part in parts))
        else:
            value = computed.fget(self)
        return write_through(value, SplitWeight(self, leaf), parameter=True)

    def write(self: nn.Module, value: Tensor) -> None:
        if not _is_plainly_split(self, leaf):
            computed.fset(self, value)
            return
        with torch.no_grad():
            SplitWeight(self, leaf).assign(value)

    def delete(self: nn.Module) -> None:
        name = SplitWeight(self, leaf).name
        raise AttributeError(
            f"{name} is split and cannot be taken from its module: call merge_fused(model) first"
        )

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        state = split_state(self)
        if param is None or state is None or name not in state.leaves:
            made_by_torch.__bases__[0].register_parameter(self, name, param)
            return
        setattr(self, name, param.detach())
        SplitWeight(self, name).require_grad(param.requires_grad)

    setattr(made_by_torch, leaf, property(read, write, delete))
    setattr(made_by_torch, "register_parameter", register_parameter)  # noqa: B010


def _is_plainly_split(module: nn.Module, leaf: str) -> bool:
    """Return whether split_fused's parametrization is the only one: not during a merge or with another on top."""
    return split_state(module) is not None and len(getattr(module, "parametrizations")[leaf]) == 1  # noqa: B009


def merge_module(module: nn.Module) -> None:
    """Undo :func:`split_module`: restore the parameters, their order and values, and remove the hooks."""
    state: SplitState = module.__dict__.pop(_STATE)
    for handle in state.handles:
        handle.remove()
    _give_own_class(module)
    for leaf in state.leaves:
        parts = parts_of(module, leaf)
        trainable = any(part.requires_grad for part in parts)
        for part in parts:  # parametrize would register a frozen weight as a buffer
            part.requires_grad_(True)
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)
        getattr(module, leaf).requires_grad_(trainable)
    for leaf in state.order:  # re-registered parameters are at the end
        module._parameters[leaf] = module._parameters.pop(leaf)


def _give_own_class(module: nn.Module) -> None:
    """Give the module a class of its own. Deep copies share the class that torch made and removes the weight from."""
    shared = type(module)
    own = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, own)


def parts_of(module: nn.Module, leaf: str) -> list[Tensor]:
    """Return the parameters that a split weight is computed from."""
    originals: Any = getattr(module, "parametrizations")[leaf]  # noqa: B009 (nn.Module types it as a Tensor)
    return [getattr(originals, f"original{i}") for i in range(originals.ntensors)]


def gathered(part: Tensor) -> Tensor:
    """Return the whole part on every process if it is sharded, otherwise the part itself."""
    whole: Tensor = part.full_tensor() if any_sharded([part]) else part  # type: ignore[attr-defined]
    return whole


def _sharded_as(part: Any, each: Tensor) -> Tensor:
    """Return the first process's `each`, sharded like `part`. Collective."""
    from torch.distributed.tensor import distribute_tensor

    whole = each.to(part.dtype).contiguous()
    return distribute_tensor(whole, part.device_mesh, part.placements)


def any_sharded(tensors: list[Tensor]) -> bool:
    """Return whether any tensor is a DTensor, without importing torch.distributed."""
    return any(hasattr(tensor, "placements") for tensor in tensors)


def _merge_on_save(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: object
) -> None:
    """state_dict post-hook: replace the parts by the fused weight, at its original position."""
    state: SplitState = module.__dict__[_STATE]
    merged: dict[str, Tensor] = {}
    for leaf in state.leaves:
        parametrization = getattr(module, "parametrizations")[leaf]  # noqa: B009
        keys = [f"{prefix}parametrizations.{leaf}.original{i}" for i in range(parametrization.ntensors)]
        parts = [state_dict[key] for key in keys if key in state_dict]
        # Sharded parts stay split: concatenating DTensors along a sharded dimension raises or hangs.
        if len(parts) < len(keys) or any_sharded(parts):
            return
        whole = parametrization[0].fuse(parts)
        of_module = all(a.data_ptr() == b.data_ptr() for a, b in zip(parts, parts_of(module, leaf)))
        merged[prefix + leaf] = (
            write_through(whole, SplitWeight(module, leaf), parameter=False) if of_module else whole
        )
    # This module's keys are the last ones of the state dict, so iterate backwards over these only.
    keys = list(takewhile(lambda key: key.startswith(prefix), reversed(state_dict)))
    own = {key: state_dict.pop(key) for key in reversed(keys)}
    inner = f"{prefix}parametrizations"
    for leaf in state.order:
        key = prefix + leaf
        if key in merged:
            state_dict[key] = merged[key]
        elif key in own:
            state_dict[key] = own.pop(key)
    state_dict.update({key: tensor for key, tensor in own.items() if not _is_part(key, inner, state)})
    metadata: dict[str, object] = getattr(state_dict, "_metadata", {})
    for name in (inner, *(f"{inner}.{leaf}{tail}" for leaf in state.leaves for tail in ("", ".0"))):
        metadata.pop(name, None)


def _is_part(key: str, inner: str, state: SplitState) -> bool:
    return any(key.startswith(f"{inner}.{leaf}.original") for leaf in state.leaves)


def _split_on_load(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: object,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """load_state_dict pre-hook: replace a fused weight by its parts. Parts pass unchanged."""
    state: SplitState = module.__dict__[_STATE]
    for leaf in state.leaves:
        if prefix + leaf not in state_dict:
            continue
        fused, own = state_dict.pop(prefix + leaf), parts_of(module, leaf)
        parametrization: FusedWeight = getattr(module, "parametrizations")[leaf][0]  # noqa: B009
        expected = list(own[0].shape)
        expected[parametrization.dim] = sum(parametrization.sizes)
        parts: tuple[Tensor, ...] = tuple(own)  # after an error, no missing key is reported as well
        if any_sharded(own):
            error_msgs.append(
                f"{prefix}{leaf} is split and sharded: its parts load in the split layout only; "
                "load this state dict before fully_shard"
            )
        elif list(fused.shape) != expected:
            error_msgs.append(
                f"size mismatch for {prefix}{leaf}: shape {tuple(fused.shape)} in the state dict, "
                f"{tuple(expected)} in the model (split by split_fused)"
            )
        else:
            parts = parametrization.right_inverse(fused)
        state_dict.update(
            {f"{prefix}parametrizations.{leaf}.original{i}": part for i, part in enumerate(parts)}
        )
