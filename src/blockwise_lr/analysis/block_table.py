"""The output of `blockwise-lr inspect`: the blocks of a model as a table, a list of all parameters, or JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from torch import nn

from blockwise_lr.blocks import Block, BlockMap, classify, split_fused
from blockwise_lr.blocks.block import Assignment
from blockwise_lr.blocks.classify import Overrides
from blockwise_lr.blocks.layout import PART_WORDS
from blockwise_lr.errors import UserError
from blockwise_lr.optim.ratios import resolve_ratios

# Patterns as people write them to group parameters by name alone. The first one that a name contains decides.
PLAIN = {
    Block.EMB: r"emb|wte|wpe",
    Block.QK: r"q_proj|k_proj|query|key|c_attn|qkv",
    Block.VO: r"v_proj|o_proj|out_proj|value",
    Block.NORM: r"norm|ln_",
    Block.FFN: r"mlp|ffn|fc\d|dense|expert",
    Block.HEAD: r"head",
}


def inspect_model(
    model: nn.Module,
    *,
    overrides: Overrides,
    ratios: Mapping[Block, float],
    verbose: bool,
    as_json: bool,
    console: Console | None = None,
) -> None:
    """Print the blocks of a model after its fused weights are split. The model is split in place.

    Args:
        model: any model; nothing is computed with it.
        overrides: as for ``classify``.
        ratios: learning-rate ratios to show for the blocks.
        verbose: also list every parameter with the reason for its block.
        as_json: print JSON instead of tables.
        console: where to print. Default: stdout.

    Raises:
        UserError: no rule matches a parameter, or an override matches nothing.
    """
    try:
        whole = classify(model, overrides)
        fused = {name: whole.assignment(name) for name in whole if whole[name] is Block.QKV}
        known = all(entry.slices is not None for entry in fused.values())
        blocks = classify(split_fused(model), overrides) if known else whole
    except ValueError as error:
        raise UserError(str(error)) from None
    console = console or Console()
    plain = mistakes_of_names(whole)
    if as_json:
        print(json.dumps(_as_dict(blocks, fused, plain, ratios), indent=2))
        return
    console.print(_by_block(blocks, resolve_ratios(ratios)))
    if verbose:
        console.print(_every_parameter(blocks))
    for line in (*_about_fused(fused), *_about_names(plain, len(whole))):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def mistakes_of_names(blocks: BlockMap) -> dict[str, str]:
    """Return the parameters that the patterns in `PLAIN` assign to a wrong block: {name: the block they assign}.

    A fused weight is always wrong, because its parts belong to different groups.

    Args:
        blocks: the correct blocks, before fused weights are split.
    """
    found = {}
    for name, block in blocks.items():
        assigned = next((b for b, pattern in PLAIN.items() if re.search(pattern, name)), None)
        if assigned is not block:
            found[name] = "no group" if assigned is None else assigned.value
    return found


def _by_block(blocks: BlockMap, ratios: Mapping[Block, float]) -> Table:
    table = Table("block", "parameters", "share", "ratio", Column("for example", overflow="fold"))
    for column in table.columns[1:4]:
        column.justify = "right"
    counts = blocks.counts()
    for block, numel in counts.items():
        example = next(name for name in blocks if blocks[name] is block)
        share = f"{numel / sum(counts.values()):.2%}"
        table.add_row(block.value, f"{numel:,}", share, f"{ratios[block]:g}", Text(example))
    table.add_row("all", f"{sum(counts.values()):,}", "", "", "", style="bold")
    return table


def _every_parameter(blocks: BlockMap) -> Table:
    table = Table(Column("parameter", overflow="fold"), "block", "elements", Column("why", overflow="fold"))
    for name in blocks:
        numel = f"{blocks.assignment(name).numel:,}"
        # rich reads brackets in a plain string as markup; a Text is printed as it is.
        table.add_row(Text(name), blocks[name].value, numel, Text(blocks.reason(name)))
    return table


def _about_fused(fused: Mapping[str, Assignment]) -> list[str]:
    lines = []
    for pattern, names in _by_pattern(fused).items():
        entry = fused[names[0]]
        parts = ", ".join(f"{PART_WORDS[part]} ({block})" for part, block in (entry.parts or {}).items())
        verdict = "split_fused turns them into separate parameters"
        if entry.slices is None:
            verdict = (
                "the layout of this class is not known, so split_fused cannot split it (see its layout=)"
            )
        lines.append(f"fused, {_times(names)}: {pattern} holds {parts}; {verdict}")
    return lines


def _about_names(plain: Mapping[str, str], total: int) -> list[str]:
    if not plain:
        return [f"plain name patterns would assign all {total} parameters to the right block"]
    lines = [
        f"plain name patterns ({_patterns()}) would assign {len(plain)} of {total} parameters to a wrong block:"
    ]
    return lines + [
        f"  {pattern} to {plain[names[0]]}, {_times(names)}" for pattern, names in _by_pattern(plain).items()
    ]


def _patterns() -> str:
    return ", ".join(f"{block.value}: {pattern}" for block, pattern in PLAIN.items())


def _by_pattern(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names that differ only in layer numbers: {name with N for each number: names}."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "N", name), []).append(name)
    return groups


def _times(names: list[str]) -> str:
    return "once" if len(names) == 1 else f"{len(names)} times"


def _as_dict(
    blocks: BlockMap, fused: Mapping[str, Assignment], plain: Mapping[str, str], ratios: Mapping[Block, float]
) -> dict[str, object]:
    parameters = {
        name: {"block": block.value, "numel": blocks.assignment(name).numel, "reason": blocks.reason(name)}
        for name, block in blocks.items()
    }
    known = resolve_ratios(ratios)
    return {
        "blocks": {block.value: numel for block, numel in blocks.counts().items()},
        "ratios": {block.value: known[block] for block in blocks.counts()},
        "parameters": parameters,
        "fused": {
            name: {p: b.value for p, b in (entry.parts or {}).items()} for name, entry in fused.items()
        },
        "mistakes_of_plain_names": dict(plain),
    }
