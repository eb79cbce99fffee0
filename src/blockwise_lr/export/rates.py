"""What each group of a model's parameters gets: its learning-rate ratio and its weight decay."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from blockwise_lr.arguments import check_model
from blockwise_lr.blocks import Block, BlockMap, canonical_name, classify
from blockwise_lr.optim import param_groups
from blockwise_lr.optim.decay import (
    WEIGHT_DECAY,
    Decay,
    NoDecay,
    WeightDecay,
    check_weight_decays,
    resolve_decay,
    resolve_no_decay,
)
from blockwise_lr.optim.ratios import Ratios, given_ratios, resolve_ratios


@dataclass(frozen=True)
class RateGroup:
    """Parameters that share a learning rate and a weight decay.

    Args:
        label: unique name of the group, such as "qk".
        block: the block, as in :class:`blockwise_lr.Block`.
        lr_ratio: learning rate divided by the base learning rate.
        weight_decay: decoupled weight decay, as in torch's AdamW.
        names: the parameters' names.
    """

    label: str
    block: str
    lr_ratio: float
    weight_decay: float
    names: tuple[str, ...]


@dataclass(frozen=True)
class Rates:
    """The learning rates of a model's blocks, ready for export.

    Args:
        groups: the groups; each trainable parameter is in exactly one.
        lr: base learning rate; None if it is left to the target's own setting.
        model: the model, for parameters whose type matters to a target.
        naming: whose parameter names the groups hold, in words.
        lost: what the export cannot express, a sentence each.
        fused_ratio: the ratio of "qkv" if the user named it, for weights that the target fuses; otherwise None.
        fused_decay: the weight decay of "qkv" at ratio 1 if the user named it, or None.
        constant_decay: whether every block decays as at ratio 1, so that its weight decay is divided by its ratio.
    """

    groups: tuple[RateGroup, ...]
    lr: float | None
    model: nn.Module
    naming: str
    lost: tuple[str, ...] = ()
    fused_ratio: float | None = None
    fused_decay: float | None = None
    constant_decay: bool = False

    @property
    def base_decay(self) -> float:
        """The largest weight decay, which the others are multiples of."""
        return max(group.weight_decay for group in self.groups)

    @property
    def names(self) -> dict[str, list[str]]:
        """The parameters' names by group: {label: names}."""
        return {group.label: list(group.names) for group in self.groups}

    @property
    def label_of(self) -> dict[str, str]:
        """The group of each parameter: {name: label}."""
        return {name: group.label for group in self.groups for name in group.names}


def rates_of(
    model: nn.Module,
    *,
    lr: float | None = None,
    ratios: Ratios | None = None,
    weight_decay: WeightDecay = WEIGHT_DECAY,
    no_decay: NoDecay = (),
    decay: Decay = "coupled",
    blocks: BlockMap | None = None,
) -> Rates:
    """Return the rates that :func:`blockwise_lr.param_groups` would give each parameter, under its name.

    A fused QKV weight that is not split gets the lower ratio of its parts, unless `ratios` names "qkv"; `lost` says
    so. `ratios` None means the default of ``param_groups``; the other arguments are its own.
    """
    check_model(model, "export_rates")
    blocks = classify(model) if blocks is None else blocks
    settings: dict[str, Any] = {
        "weight_decay": weight_decay,
        "no_decay": no_decay,
        "decay": decay,
        "blocks": blocks,
    }
    lost: list[str] = []
    if ratios is not None:
        settings["ratios"] = ratios
    fused = [name for name in blocks if blocks[name] is Block.QKV]
    given = given_ratios(settings.get("ratios", _default_ratios()))
    fused_ratio = resolve_ratios(given)[Block.QKV] if any(key == Block.QKV for key in given) else None
    if fused and fused_ratio is None:
        settings["ratios"], lost = _with_fused(given, fused, blocks)
    groups = param_groups(model, 1.0 if lr is None else lr, **settings)
    seen: dict[str, int] = {}
    found = []
    for group in groups:
        count = seen[group["block"]] = seen.get(group["block"], 0) + 1
        label = group["block"] if count == 1 else f"{group['block']}_{count}"
        names = tuple(canonical_name(name) for name in group["names"])
        found.append(RateGroup(label, group["block"], group["lr_ratio"], group["weight_decay"], names))
    return Rates(
        tuple(found),
        lr,
        model,
        f"{type(model).__name__}'s own",
        tuple(lost),
        fused_ratio,
        _named_fused_decay(weight_decay, no_decay),
        constant_decay=resolve_decay(weight_decay, decay)[1] == "constant",
    )


def _named_fused_decay(weight_decay: WeightDecay, no_decay: NoDecay) -> float | None:
    """Return the weight decay that the user named for "qkv"."""
    if no_decay != "1d" and Block.QKV in (resolve_no_decay(no_decay) or ()):
        return 0.0
    if not isinstance(weight_decay, Mapping):
        return None
    return check_weight_decays(weight_decay).get(Block.QKV)


def _default_ratios() -> Ratios:
    default: Ratios = inspect.signature(param_groups).parameters["ratios"].default
    return default


def _with_fused(
    given: Mapping[Any, float], fused: Iterable[str], blocks: BlockMap
) -> tuple[dict[Block, float], list[str]]:
    """Return the ratios with one for fused weights, the lower of their parts', and what that loses."""
    ratio_of = resolve_ratios(given)
    parts = {block for name in fused for block in (blocks.assignment(name).parts or {}).values()}
    parts = parts or {Block.QK, Block.VO}
    shared = min(ratio_of[block] for block in parts)
    named = {Block(key): ratio_of[Block(key)] for key in given} | {Block.QKV: shared}
    if len({ratio_of[block] for block in parts}) == 1:
        return named, []
    return named, [fused_note(fused, {block: ratio_of[block] for block in sorted(parts)}, shared)]


def fused_note(names: Iterable[str], ratios: Mapping[str, float], shared: float) -> str:
    """Return what is lost where one parameter holds several blocks."""
    return (
        f"{_held(names, 'ratio', ratios)} in one parameter, which can have only one learning rate: it gets ratio "
        f'{shared:g}, the lower; choose another with the ratio of "qkv", or train a model with separate projections'
    )


def fused_decay_note(names: Iterable[str], decays: Mapping[str, float], shared: float) -> str:
    """Return what is lost where the blocks of one parameter have weight decays of their own."""
    return (
        f"{_held(names, 'weight decay', decays)} in one parameter, which can have only one: it gets {shared:g}; choose "
        'another with the weight decay of "qkv"'
    )


def _held(names: Iterable[str], what: str, values: Mapping[str, float]) -> str:
    which = ", ".join(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    return f"{which} holds " + " and ".join(
        f"{block.upper()} ({what} {value:g})" for block, value in values.items()
    )
