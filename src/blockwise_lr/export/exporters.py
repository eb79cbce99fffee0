"""The targets by name, and the function that exports to one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from blockwise_lr.blocks import BlockMap
from blockwise_lr.errors import UserError
from blockwise_lr.export.automodel import write_automodel
from blockwise_lr.export.axolotl import axolotl_losses, write_axolotl
from blockwise_lr.export.codebase_names import in_names_of
from blockwise_lr.export.fairseq2 import write_fairseq2
from blockwise_lr.export.megatron import write_megatron
from blockwise_lr.export.nanochat import nanochat_losses, write_nanochat
from blockwise_lr.export.olmo_core import write_olmo_core
from blockwise_lr.export.optax import write_optax
from blockwise_lr.export.rates import RateGroup, Rates, rates_of
from blockwise_lr.export.timm import write_timm
from blockwise_lr.export.torch_groups import write_json
from blockwise_lr.export.torchtitan import write_torchtitan
from blockwise_lr.optim.decay import WEIGHT_DECAY, Decay, NoDecay, WeightDecay
from blockwise_lr.optim.ratios import Ratios

Naming = Literal["auto", "model"]

TARGETS: Mapping[str, Callable[[Rates], str]] = {
    "torchtitan": write_torchtitan,
    "automodel": write_automodel,
    "megatron": write_megatron,
    "olmo-core": write_olmo_core,
    "fairseq2": write_fairseq2,
    "axolotl": write_axolotl,
    "timm": write_timm,
    "json": write_json,
    "optax": write_optax,
    "nanochat": write_nanochat,
}
"""The targets of :func:`export_rates`. "json" holds plain torch groups, for DeepSpeed and loops of your own."""

_LOSSES: Mapping[str, Callable[[Rates], tuple[str, ...]]] = {
    "axolotl": axolotl_losses,
    "nanochat": nanochat_losses,
}
"""What the targets that cannot express every block lose."""

REFUSED: Mapping[str, str] = {
    "litgpt": "LitGPT sets the rate of every group to one number at each step (litgpt/pretrain.py), so no "
    "configuration gives a block its own rate: in your copy, replace that loop by set_lr(optimizer, lr) of "
    "blockwise_lr, with groups from param_groups, or choose another target"
}
"""Trainers that cannot have a rate per block, with the reason."""


@dataclass(frozen=True)
class ExportedRates:
    """Learning rates by block as configuration for another trainer.

    Args:
        target: the target's name, a key of :data:`TARGETS`.
        text: the configuration: Python, YAML, JSON or flags.
        groups: what each group of parameters gets.
        naming: whose parameter names the patterns are for.
        lost: what the target cannot express, a sentence each; `text` has them as comments.
    """

    target: str
    text: str
    groups: tuple[RateGroup, ...]
    naming: str
    lost: tuple[str, ...]


def export_rates(
    model: nn.Module,
    to: str,
    *,
    lr: float | None = None,
    ratios: Ratios | None = None,
    weight_decay: WeightDecay = WEIGHT_DECAY,
    no_decay: NoDecay = (),
    decay: Decay = "coupled",
    blocks: BlockMap | None = None,
    names: Naming = "auto",
) -> ExportedRates:
    """Export the learning rates that ``param_groups`` would give a model, as another trainer's own configuration.

    The patterns are made from the parameters' names, and proved: the target's matching rule is applied to every name
    and must give the block map.

    Args:
        model: the model; it may be on the meta device.
        to: the target, a key of :data:`TARGETS`.
        lr: base learning rate; None leaves it to the target's own setting, which "automodel", "timm", "json" and
            "optax" allow.
        ratios, weight_decay, no_decay, decay, blocks: as in :func:`blockwise_lr.param_groups`, with its defaults.
        names: "auto" writes the patterns for the parameter names of the target's own model code, where the model is a
            transformers model that it has too. "model" keeps the names of `model`.

    Returns:
        The configuration as text, and what it cannot express.

    Raises:
        UserError: the target is unknown or cannot have a rate per block, needs `lr`, or no pattern tells a parameter
            from those of other blocks. The message names it. It is a ValueError.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"wte": nn.Embedding(16, 4), "ln_f": nn.LayerNorm(4)})
        >>> print(export_rates(model, "automodel", ratios={"emb": 4}).text.split("overrides:")[1].strip())
        - pattern: '^wte\\.'  # emb
              lr_mult: 4
    """
    if to in REFUSED:
        raise UserError(REFUSED[to])
    if to not in TARGETS:
        raise UserError(f"there is no target {to!r}; the targets are {', '.join(TARGETS)}")
    if names not in ("auto", "model"):
        raise UserError(f'names is {names!r}; expected "auto" or "model"')
    settings: dict[str, Any] = {
        "weight_decay": weight_decay,
        "no_decay": no_decay,
        "decay": decay,
        "blocks": blocks,
    }
    rates = rates_of(model, lr=lr, ratios=ratios, **settings)
    if names == "auto":
        rates = in_names_of(to, rates)
    if to in _LOSSES:
        rates = replace(rates, lost=(*rates.lost, *_LOSSES[to](rates)))
    return ExportedRates(to, TARGETS[to](rates), rates.groups, rates.naming, rates.lost)
