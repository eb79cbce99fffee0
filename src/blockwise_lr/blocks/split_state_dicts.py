"""Hooks that save and load a split weight in its original layout."""

from __future__ import annotations

from itertools import takewhile

from torch import Tensor, nn

from blockwise_lr.blocks.weight_parts import (
    SPLIT_STATE,
    FusedWeight,
    SplitState,
    SplitWeight,
    any_sharded,
    parts_of,
)
from blockwise_lr.blocks.write_through import write_through


def merge_on_save(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: object
) -> None:
    """state_dict post-hook: replace the parts by the fused weight, at its original position."""
    state: SplitState = module.__dict__[SPLIT_STATE]
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


def split_on_load(
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
    state: SplitState = module.__dict__[SPLIT_STATE]
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
