"""axolotl: lr_groups and embedding_lr, as YAML for its configuration. It cannot express every block."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from blockwise_lr.blocks import canonical_name
from blockwise_lr.export.fragments import SUBSTRINGS
from blockwise_lr.export.lines import header, needed_lr, number, quoted
from blockwise_lr.export.patterns import find_patterns
from blockwise_lr.export.proof import first_match, prove
from blockwise_lr.export.rates import Rates

_EMBEDDINGS = ("embed_tokens", "lm_head")
_SAVED = "modules_to_save.default.weight"  # what PEFT trains whole, next to an adapter
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def write_axolotl(rates: Rates) -> str:
    """Return YAML with `learning_rate`, `embedding_lr` and `lr_groups`; comments name what is lost.

    axolotl's rule (0.19.0, axolotl/core/trainers/mixins/optimizer.py, create_optimizer_grouped_parameters): names with
    embed_tokens or lm_head have embedding_lr, without weight decay, and so do weights that PEFT trains whole
    (modules_to_save.default.weight); norms and biases have learning_rate, without weight decay; the others have the
    rate of the first of the lr_groups with a substring in the name, or else learning_rate. Which names are norms and
    biases: transformers 5.23, Trainer.get_decay_parameter_names.
    """
    lr = needed_lr(rates, "axolotl")
    ratio_of = {group.label: group.lr_ratio for group in rates.groups}
    kinds = _kinds(rates)
    embeddings = _embeddings(rates, kinds)
    free = {name: label for name, label in rates.label_of.items() if kinds[name] == "free"}
    own: dict[str, list[str]] = {}
    for name, label in free.items():
        if ratio_of[label] != 1:
            own.setdefault(label, []).append(name)
    patterns = find_patterns(own, SUBSTRINGS, others=[name for name in free if free[name] not in own])
    rule = first_match(patterns, lambda pattern, name: pattern in name)
    prove("axolotl", {name: label if label in own else None for name, label in free.items()}, rule)
    lines = [
        *header(rates, "axolotl"),
        f"learning_rate: {number(lr)}",
        f"weight_decay: {number(_decay(rates, free))}",
    ]
    if embeddings:
        lines.append(f"embedding_lr: {number(min(embeddings.values()) * lr)}  # embed_tokens and lm_head")
    lines += ["lr_groups:"] if own else []
    for label, found in patterns.items():
        lines += [
            f"  - name: {label}",
            f"    modules: [{', '.join(map(quoted, found))}]",
            f"    lr: {number(ratio_of[label] * lr)}",
        ]
    return "\n".join([*lines, ""])


def _kinds(rates: Rates) -> dict[str, str]:
    """Return where axolotl puts each parameter: "embeddings", "fixed" at the base rate, or "free" for lr_groups."""
    layer_norms = {
        canonical_name(f"{path}.{leaf}")
        for path, module in rates.model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for leaf, _ in module.named_parameters()
    }
    kinds = {}
    for name in rates.label_of:
        if name.endswith(_SAVED) or any(each in name for each in _EMBEDDINGS):
            kinds[name] = "embeddings"
        else:
            kinds[name] = "fixed" if name in layer_norms or _NO_DECAY.search(name.lower()) else "free"
    return kinds


def _embeddings(rates: Rates, kinds: dict[str, str]) -> dict[str, float]:
    """Return the groups with embeddings, in axolotl's sense, and their ratios."""
    return {g.label: g.lr_ratio for g in rates.groups if any(kinds[name] == "embeddings" for name in g.names)}


def _decay(rates: Rates, free: Iterable[str]) -> float:
    members = set(free)
    return max((g.weight_decay for g in rates.groups if members & set(g.names)), default=rates.base_decay)


def axolotl_losses(rates: Rates) -> tuple[str, ...]:
    """Return what axolotl cannot express of these rates, a sentence each."""
    kinds = _kinds(rates)
    embeddings = _embeddings(rates, kinds)
    lost = []
    if len(set(embeddings.values())) > 1:
        wanted = " and ".join(
            f"{label.upper()} (ratio {number(ratio)})" for label, ratio in embeddings.items()
        )
        lost.append(
            f"axolotl gives embed_tokens and lm_head one rate, for {wanted}: they get ratio "
            f"{number(min(embeddings.values()))}, the lower"
        )
    for group in rates.groups:
        fixed = [name for name in group.names if kinds[name] == "fixed"]
        if fixed and group.lr_ratio != 1:
            what = "all" if len(fixed) == len(group.names) else "the norms and biases"
            lost.append(
                f"axolotl keeps norms and biases at the base rate: {what} of {group.label.upper()} "
                f"({fixed[0]} ...) get ratio 1, not {number(group.lr_ratio)}"
            )
    decay = _decay(rates, [name for name, kind in kinds.items() if kind == "free"])
    undecayed = [
        g.label.upper() for g in rates.groups if g.weight_decay and any(kinds[n] != "free" for n in g.names)
    ]
    if undecayed:
        lost.append(f"axolotl exempts embeddings, norms and biases from weight decay: {', '.join(undecayed)}")
    for group in rates.groups:
        if group.weight_decay != decay and any(kinds[name] == "free" for name in group.names):
            lost.append(
                f"axolotl has one weight decay: {group.label.upper()} gets {number(decay)}, not "
                f"{number(group.weight_decay)}"
            )
    return tuple(lost)
