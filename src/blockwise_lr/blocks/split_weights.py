"""How a split weight is kept: computed from its parts, but saved and loaded in the original layout."""

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
from blockwise_lr.blocks.write_through import in_forward, live

_STATE = "_blockwise_split"


class FusedWeight(nn.Module):
    """The parametrization of a fused weight: `weight = cat(parts, dim)`.

    Args:
        part_names: what the parts are, in order, e.g. ("q", "k", "v").
        sizes: width of each part along `dim`; may differ (grouped-query attention).
        dim: 0 for the rows of a Linear or a bias, 1 for the columns of transformers' Conv1D.
        repeats: number of stretches that each part falls into, where parts lie head by head.
    """

    def __init__(
        self, part_names: tuple[str, ...], sizes: tuple[int, ...], dim: int, repeats: int = 1
    ) -> None:
        super().__init__()
        self.part_names, self.sizes, self.dim, self.repeats = part_names, sizes, dim, repeats

    def forward(self, *parts: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.fuse(parts)
        # A parameter requires gradients under no_grad too, and torch.matmul chooses its kernel by that:
        # without this, evaluation on strided inputs (nn.MultiheadAttention's) differs in the last bits.
        with torch.inference_mode(False), torch.enable_grad():
            return self.fuse(parts)

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """The weight in its original layout."""
        if self.repeats == 1:
            return torch.cat(list(parts), dim=self.dim)
        stretches = [torch.unflatten(part, self.dim, (self.repeats, -1)) for part in parts]
        return torch.cat(stretches, dim=self.dim + 1).flatten(self.dim, self.dim + 1)

    def right_inverse(self, fused: Tensor) -> tuple[Tensor, ...]:
        # Clones, so that no part keeps the fused storage alive, shares it with another or has its strides.
        return tuple(
            piece.clone(memory_format=torch.contiguous_format) for piece in self.pieces(fused.detach())
        )

    def pieces(self, fused: Tensor) -> list[Tensor]:
        """The parts of a weight in its original layout; some share its memory."""
        stretches = torch.unflatten(fused, self.dim, (self.repeats, -1))
        lengths = [size // self.repeats for size in self.sizes]
        parts = torch.split(stretches, lengths, dim=self.dim + 1)
        return [part.flatten(self.dim, self.dim + 1) for part in parts]


class SplitWeight:
    """The parts of a module's split weight, as :mod:`blockwise_lr.blocks.write_through` writes to them.

    Args:
        module: the module that the weight belongs to.
        leaf: the weight's own name.
    """

    def __init__(self, module: nn.Module, leaf: str) -> None:
        self.module, self.leaf, self.name = (
            module,
            leaf,
            f"{type_before_parametrizations(module).__name__}.{leaf}",
        )

    @property
    def concatenation(self) -> FusedWeight:
        found: FusedWeight = getattr(self.module, "parametrizations")[self.leaf][0]  # noqa: B009
        return found

    def tensors(self) -> list[Tensor]:
        return parts_of(self.module, self.leaf) if self._is_split else [getattr(self.module, self.leaf)]

    def whole(self) -> Tensor:
        tensors = [gathered(tensor) for tensor in self.tensors()]
        return self.concatenation.fuse(tensors) if self._is_split else tensors[0]

    def assign(self, value: Tensor) -> None:
        """Copy a whole weight into the parts; a type or device that they do not have is taken over, too.

        Raises:
            ValueError: the weight has another shape.
        """
        parts = self.tensors()
        shape = list(parts[0].shape)
        if self._is_split:
            shape[self.concatenation.dim] = sum(self.concatenation.sizes)
        if list(value.shape) != shape:
            raise ValueError(
                f"{self.name} has shape {tuple(shape)} and is split; it cannot become one of shape "
                f"{tuple(value.shape)}: call merge_fused(model) first, and split_fused after"
            )
        pieces = self.concatenation.pieces(value.detach()) if self._is_split else [value.detach()]
        for part, piece in zip(parts, pieces):
            if any_sharded([part]):
                part.copy_(_sharded_as(part, piece))
            elif (part.dtype, part.device) == (piece.dtype, piece.device):
                part.copy_(piece)
            else:
                part.data = piece.clone(memory_format=torch.contiguous_format)

    def require_grad(self, flag: bool) -> None:
        for part in self.tensors():
            part.requires_grad_(flag)

    @property
    def _is_split(self) -> bool:  # a tensor may outlive merge_fused
        return parametrize.is_parametrized(self.module, self.leaf)


@dataclass(frozen=True)
class SplitState:
    """What a split module keeps, for its hooks and for the way back.

    Args:
        order: names of all the module's own parameters, in their original order.
        leaves: names of those that are split.
        handles: of the state_dict hooks.
    """

    order: tuple[str, ...]
    leaves: tuple[str, ...]
    handles: tuple[RemovableHandle, ...]


def split_state(module: nn.Module) -> SplitState | None:
    """What :func:`split_module` left in a module, None if it is not split."""
    state: SplitState | None = module.__dict__.get(_STATE)
    return state


def split_layout(module: nn.Module, leaf: str) -> Layout | None:
    """How the parts of a split weight lie in it, None if it is not split."""
    state = split_state(module)
    if state is None or leaf not in state.leaves:
        return None
    concatenation = SplitWeight(module, leaf).concatenation
    return Layout(tuple(zip(concatenation.part_names, concatenation.sizes)), concatenation.repeats)


def split_module(module: nn.Module, concatenations: dict[str, FusedWeight]) -> None:
    """Split some of a module's own parameters, and have its state dict keep the original layout.

    Args:
        module: the module; changed in place.
        concatenations: name of the parameter -> how it is put together.
    """
    order = tuple(module._parameters)
    for leaf, concatenation in concatenations.items():
        parametrize.register_parametrization(module, leaf, concatenation)
        _let_writes_through(module, leaf)
    handles = (
        module.register_state_dict_post_hook(_merge_on_save),  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_split_on_load),  # type: ignore[no-untyped-call]
    )
    module.__dict__[_STATE] = SplitState(order, tuple(concatenations), handles)


def _let_writes_through(module: nn.Module, leaf: str) -> None:
    """Have the weight, read outside of a forward pass, and its assignment reach the parts."""
    made_by_torch: Any = type(module)  # for this module and its deep copies
    computed: Any = made_by_torch.__dict__[leaf]

    def read(self: nn.Module) -> Tensor:
        if torch.compiler.is_compiling() or in_forward() or not _is_plainly_split(self, leaf):
            plain: Tensor = computed.fget(self)
            return plain
        parts = parts_of(self, leaf)
        if any_sharded(parts) and not parts[0].is_meta:
            value: Tensor = SplitWeight(self, leaf).concatenation(*(gathered(part) for part in parts))
        else:
            value = computed.fget(self)
        return live(value, SplitWeight(self, leaf), parameter=True)

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
    """Whether the weight is its parts and nothing else: not being merged, and not parametrized once more."""
    return split_state(module) is not None and len(getattr(module, "parametrizations")[leaf]) == 1  # noqa: B009


def merge_module(module: nn.Module) -> None:
    """Undo :func:`split_module`: parameters, their order and their values as they were, hooks gone."""
    state: SplitState = module.__dict__.pop(_STATE)
    for handle in state.handles:
        handle.remove()
    _give_own_class(module)
    for leaf in state.leaves:
        parts = parts_of(module, leaf)
        trainable = any(part.requires_grad for part in parts)
        for part in parts:  # or parametrize would register a frozen weight as a buffer
            part.requires_grad_(True)
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)
        getattr(module, leaf).requires_grad_(trainable)
    for leaf in state.order:  # a parameter that is registered again goes to the end
        module._parameters[leaf] = module._parameters.pop(leaf)


def _give_own_class(module: nn.Module) -> None:
    """Deep copies share the class that torch made, and torch takes the weight's property from it."""
    shared = type(module)
    own = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, own)


def parts_of(module: nn.Module, leaf: str) -> list[Tensor]:
    """The parameters that a split weight is put together from."""
    originals: Any = getattr(module, "parametrizations")[leaf]  # noqa: B009 (nn.Module types it as a Tensor)
    return [getattr(originals, f"original{i}") for i in range(originals.ntensors)]


def gathered(part: Tensor) -> Tensor:
    """All of a part on every process, if it is sharded."""
    whole: Tensor = part.full_tensor() if any_sharded([part]) else part  # type: ignore[attr-defined]
    return whole


def _sharded_as(part: Any, piece: Tensor) -> Tensor:
    """What the first process has for a part, sharded as the part is; all processes take part."""
    from torch.distributed.tensor import distribute_tensor

    whole = piece.to(part.dtype).contiguous()
    return distribute_tensor(whole, part.device_mesh, part.placements)


def any_sharded(tensors: list[Tensor]) -> bool:
    """Whether any is a DTensor (told without importing torch.distributed)."""
    return any(hasattr(tensor, "placements") for tensor in tensors)


def _merge_on_save(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: object
) -> None:
    """state_dict post-hook: the parts become the fused weight again, where it was."""
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
            live(whole, SplitWeight(module, leaf), parameter=False) if of_module else whole
        )
    # The module's keys are the last ones, so this walks over them alone.
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
    """load_state_dict pre-hook: a fused weight becomes parts; parts pass through."""
    state: SplitState = module.__dict__[_STATE]
    for leaf in state.leaves:
        if prefix + leaf not in state_dict:
            continue
        fused, own = state_dict.pop(prefix + leaf), parts_of(module, leaf)
        parametrization: FusedWeight = getattr(module, "parametrizations")[leaf][0]  # noqa: B009
        expected = list(own[0].shape)
        expected[parametrization.dim] = sum(parametrization.sizes)
        parts: tuple[Tensor, ...] = tuple(own)  # in case of an error, so that it is the only one reported
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
