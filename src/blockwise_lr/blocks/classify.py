"""classify: assign every trainable parameter to a block, with a reason, or raise an error that names it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from blockwise_lr.arguments import check_model
from blockwise_lr.blocks.block import Assignment, Block, BlockMap, canonical_name
from blockwise_lr.blocks.layout import PART_BLOCKS, PART_WORDS
from blockwise_lr.blocks.model_facts import ModelFacts
from blockwise_lr.blocks.name_rules import name_rule
from blockwise_lr.blocks.rules import LAST_RULES, RULES, Rule
from blockwise_lr.blocks.structure import structure_of
from blockwise_lr.blocks.topology import Site, ancestors
from blockwise_lr.blocks.user_layouts import LayoutArgument
from blockwise_lr.blocks.user_rules import registered_rule

Overrides = Mapping[str | type[nn.Module], Block]


def classify(
    model: nn.Module,
    overrides: Overrides | None = None,
    *,
    example: Any = None,
    layout: LayoutArgument | None = None,
) -> BlockMap:
    """Assign every trainable parameter of `model` to its block type.

    The rules use the model's topology and module types first, and names last (`blocks/rules.py`). The first rule that
    applies decides, and its reason is kept. A parameter that matches no rule is an error, never a guess.

    - A parameter used in several places counts once, under its first name in `named_parameters()`.
    - An embedding shared with the output head is EMB.
    - Biases are in the block of their weights.
    - Frozen parameters are left out.

    Call it after :func:`split_fused`, and before or after DDP, FSDP2, `torch.compile` or activation checkpointing: the
    blocks are the same. Call it before FSDP1, which flattens parameters.

    Args:
        model: any module; it may be on the meta device. If the layout of a fused weight is unknown, a copy of its
            attention runs once, see :func:`split_fused`.
        overrides: user overrides, applied before the rules. A key is a regular expression, searched in the
            parameter's name (with and without wrapper prefixes), or a module class, which matches everything inside
            its instances. The first match counts. Default: none.
        example, layout: how to find the layout of fused weights, as in :func:`split_fused`, for reports on a model
            that is not split. Without a known layout, reports show a fused weight as a whole. Default: none.

    Returns:
        BlockMap: name -> Block, in the order of `named_parameters()`; `.reason(name)` returns the reason.

    Raises:
        ValueError: some parameters match no rule (the message lists all of them, with the override to write); or an
            override matches nothing, is not a valid regular expression, or its value is not a Block.
        TypeError: the key of an override is neither a string nor a module class.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4), nn.Linear(4, 10))
        >>> classify(model).counts()
        {<Block.EMB: 'emb'>: 40, <Block.NORM: 'norm'>: 8, <Block.HEAD: 'head'>: 50}

    Source: the block types of the Sharpness Disparity Principle, arXiv 2502.19002, section 3.
    """
    check_model(model, "classify")
    facts = ModelFacts(model, layout=layout, example=example)
    checked = _checked_overrides(overrides or {}, facts)
    assignments: dict[str, Assignment] = {}
    unknown: list[tuple[Site, str]] = []
    for name, sites in facts.tree.sites.items():
        found = (
            _overridden(sites, checked, facts) or _by_registered_rule(sites, facts) or by_rules(sites, facts)
        )
        if isinstance(found, str):
            unknown.append((sites[0], found))
        else:
            assignments[name] = replace(found, structure=structure_of(sites[0], found.block, facts))
    if unknown:
        raise ValueError(_unknown_message(unknown))
    return BlockMap(assignments)


def by_rules(sites: Sequence[Site], facts: ModelFacts) -> Assignment | str:
    """Return the assignment of a parameter by the built-in rules, or the problem in words ("" if no rule applies).

    Args:
        sites: all places where the parameter is used. Its rules must agree.
        facts: facts about the model.
    """
    found = [_first_rule(site, facts) for site in sites]
    known = [assignment for assignment in found if assignment is not None]
    blocks = {assignment.block for assignment in known}
    if not known:
        return ""
    tied = next((assignment for assignment in known if assignment.block is Block.EMB), None)
    if tied is not None and blocks <= {Block.EMB, Block.HEAD}:
        return tied
    if len(blocks) == 1 and len(known) == len(found):
        return known[0]
    places = ", ".join(
        f"{s.path or 'the model'} ({a.block.value if a else 'unknown'})" for s, a in zip(sites, found)
    )
    return f"shared between different blocks: {places}"


def _first_rule(site: Site, facts: ModelFacts) -> Assignment | None:
    for adapted in facts.adapted(site):
        if (found := _first_rule(adapted, facts)) is not None:
            return _block_of_adapter(site, adapted, found)
    around = facts.tree.modules[site.path.rpartition(".")[0]]
    where = f"{type(around).__name__} .{facts.nesting.local(site.path)}:{site.type_name}.{site.leaf}"
    rule = _first_holding(RULES, site, facts) or name_rule(where) or _first_holding(LAST_RULES, site, facts)
    if rule is None:
        return None
    projection, parts = facts.projection(site), facts.parts(site)
    reason = rule.reason.format(
        module=site.path or "the model",
        type=site.type_name,
        leaf=site.leaf,
        attention=(projection.attention or "that is the model itself") if projection else "",
        layer=facts.layers.around(site.path) or "the layer",
        parts=", ".join(PART_WORDS[part] for part in parts),
    )
    if site.parametrized:
        weight = f"{site.path}.{site.leaf}" if site.path else site.leaf
        reason += (
            f" (split from the fused {weight})"
            if site.part
            else f" (an original of the parametrized {weight})"
        )
    if rule.block is not Block.QKV:
        return Assignment(rule.block, reason, site.param.numel())
    fused = {part: PART_BLOCKS[part] for part in parts}
    return Assignment(
        rule.block, reason, site.param.numel(), fused, projection.slices if projection else None
    )


def _first_holding(rules: Sequence[Rule], site: Site, facts: ModelFacts) -> Rule | None:
    return next((rule for rule in rules if rule.test(site, facts)), None)


def _block_of_adapter(site: Site, weight: Site, found: Assignment) -> Assignment:
    """Return the block of a parameter that adapts a weight: the block of that weight, or VO if the weight is fused."""
    kind = "a LoRA adapter" if ".lora_" in f".{site.path}." else "an adapter"
    what = "in a parametrization" if site.of_parametrization else kind
    reason = f"{what} of {weight.path}.{weight.leaf}, which {found.reason}"
    if found.block is not Block.QKV:
        return Assignment(found.block, reason, site.param.numel())
    return Assignment(Block.VO, f"{reason}: the sharper block of the two", site.param.numel())


def _checked_overrides(overrides: Overrides, facts: ModelFacts) -> list[tuple[str | type[nn.Module], Block]]:
    """Return the overrides with their values as Blocks, after checking that each is valid and matches something."""
    checked = []
    for key, value in overrides.items():
        shown = _shown(key)
        if isinstance(key, str):
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"override {shown} is not a valid regular expression: {error}") from None
        elif not (isinstance(key, type) and issubclass(key, nn.Module)):
            raise TypeError(
                f"override key {key!r} is a {type(key).__name__}; "
                "expected a regular expression (str) or a module class"
            )
        try:
            block = Block(value)
        except ValueError:
            names = ", ".join(b.value for b in Block)
            raise ValueError(
                f"override {shown} is set to {value!r}, which is no Block; the blocks are: {names}"
            ) from None
        if not any(_matches(key, site, facts) for sites in facts.tree.sites.values() for site in sites):
            raise ValueError(
                f"override {shown} matches no trainable parameter; "
                "list the names with [name for name, p in model.named_parameters() if p.requires_grad]"
            )
        checked.append((key, block))
    return checked


def _overridden(
    sites: Sequence[Site], overrides: Sequence[tuple[str | type[nn.Module], Block]], facts: ModelFacts
) -> Assignment | None:
    for key, block in overrides:
        if any(_matches(key, site, facts) for site in sites):
            return Assignment(block, f"your override {_shown(key)}", sites[0].param.numel())
    return None


def _by_registered_rule(sites: Sequence[Site], facts: ModelFacts) -> Assignment | None:
    """Return the assignment of a parameter by the rules that users registered (:func:`register_rule`)."""
    rule = next((rule for site in sites if (rule := registered_rule(site, facts.tree)) is not None), None)
    return None if rule is None else Assignment(rule.block, rule.reason, sites[0].param.numel())


def _matches(key: str | type[nn.Module], site: Site, facts: ModelFacts) -> bool:
    if isinstance(key, str):
        return any(re.search(key, name) for name in (site.name, canonical_name(site.name)))
    return any(isinstance(facts.tree.modules[path], key) for path in (site.path, *ancestors(site.path)))


def _shown(key: object) -> str:
    return f'r"{key}"' if isinstance(key, str) else getattr(key, "__name__", repr(key))


def _unknown_message(unknown: Sequence[tuple[Site, str]]) -> str:
    lines = [
        f"  {site.name}  shape {tuple(site.param.shape)}, in a {site.type_name}{note and '; '}{note}"
        for site, note in unknown
    ]
    patterns = [re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(canonical_name(s.name))) for s, _ in unknown]
    quoted = list(dict.fromkeys(f'r"^{pattern}$"' for pattern in patterns))
    shown = ", ".join(f"{pattern}: Block.OTHER" for pattern in quoted)
    plural = "1 parameter belongs" if len(unknown) == 1 else f"{len(unknown)} parameters belong"
    return "\n".join(
        [
            f"{plural} to no block that the rules know:",
            *lines,
            "Say which block each is in (OTHER gets the base learning rate):",
            f"  classify(model, overrides={{{shown}}})",
            "or, for every model, one rule for each kind of parameter (see register_rule):",
            f'  register_rule({quoted[0]}, Block.OTHER, "why it is in this block")',
        ]
    )
