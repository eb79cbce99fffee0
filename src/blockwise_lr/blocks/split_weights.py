"""Split a fused weight into parameters: compute it from its parts, but save and load the original layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockwise_lr.blocks.forward_calls import in_forward
from blockwise_lr.blocks.layout import Layout
from blockwise_lr.blocks.split_state_dicts import merge_on_save, split_on_load
from blockwise_lr.blocks.weight_parts import (
    SPLIT_STATE,
    FusedWeight,
    SplitState,
    SplitWeight,
    any_sharded,
    gathered,
    parts_of,
    split_state,
)
from blockwise_lr.blocks.write_through import write_through


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
        module.register_state_dict_post_hook(merge_on_save),  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(split_on_load),  # type: ignore[no-untyped-call]
    )
    module.__dict__[SPLIT_STATE] = SplitState(order, tuple(fused), handles)


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
    state: SplitState = module.__dict__.pop(SPLIT_STATE)
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
