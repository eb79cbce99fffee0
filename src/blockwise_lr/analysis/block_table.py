"""What `blockwise-lr inspect` shows of a model's blocks: a table, every parameter, or JSON."""

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

# What people write who group parameters by their names: the first that is found in a name counts.
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
    """Print the blocks of a model as they are once its fused weights are split; the model is split by it.

    Args:
        model: any; nothing is computed with it.
        overrides: as for ``classify``.
        ratios: shown beside the blocks.
        verbose: every parameter with its reason, too.
        as_json: JSON instead.
        console: where to. Default: stdout.

    Raises:
        UserError: a parameter that no rule knows, or an override that matches nothing.
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
    """Parameters that `PLAIN` puts elsewhere: name -> what it says of them.

    A fused weight is in the wrong place wherever it is: its parts belong to two groups.
    """
    found = {}
    for name, block in blocks.items():
        said = next((b for b, pattern in PLAIN.items() if re.search(pattern, name)), None)
        if said is not block:
            found[name] = "no group" if said is None else said.value
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
        # Text, so that no name or pattern with brackets is read as markup.
        table.add_row(Text(name), blocks[name].value, numel, Text(blocks.reason(name)))
    return table


def _about_fused(fused: Mapping[str, Assignment]) -> list[str]:
    lines = []
    for pattern, names in _alike(fused).items():
        entry = fused[names[0]]
        parts = ", ".join(f"{PART_WORDS[part]} ({block})" for part, block in (entry.parts or {}).items())
        verdict = "split_fused makes them parameters of their own"
        if entry.slices is None:
            verdict = (
                "how they lie in it is not known for this class, so split_fused refuses it (see its layout=)"
            )
        lines.append(f"fused, {_times(names)}: {pattern} makes {parts}; {verdict}")
    return lines


def _about_names(plain: Mapping[str, str], total: int) -> list[str]:
    if not plain:
        return [f"plain patterns on names would have put all {total} parameters where they belong"]
    lines = [
        f"plain patterns on names ({_patterns()}) would have put {len(plain)} of {total} parameters elsewhere:"
    ]
    return lines + [
        f"  {pattern} in {plain[names[0]]}, {_times(names)}" for pattern, names in _alike(plain).items()
    ]


def _patterns() -> str:
    return ", ".join(f"{block.value}: {pattern}" for block, pattern in PLAIN.items())


def _alike(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ in their numbers alone, by what they have in common."""
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
