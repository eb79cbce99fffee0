"""The output of `blockwise-lr inspect`: the blocks of a model as a table, a list of all parameters, or JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from torch import nn

from blockwise_lr.analysis.starting_scales import StartingScales
from blockwise_lr.blocks import Block, BlockMap, classify, split_fused
from blockwise_lr.blocks.block import Assignment
from blockwise_lr.blocks.classify import Overrides
from blockwise_lr.blocks.layout import PART_WORDS
from blockwise_lr.errors import UserError
from blockwise_lr.optim.recorded_initializers import rms_by_block

_ABOUT_SCALES = (
    "RMS: root mean square of the block's weights before training, without parameters that start at zero; LR/RMS: "
    "learning rate over it, relative to FFN's"
)

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
    rms: Mapping[str, float | None],
    relative_to_init: bool,
    verbose: bool,
    as_json: bool,
    console: Console | None = None,
) -> None:
    """Print the blocks of a model after its fused weights are split. The model is split in place.

    Args:
        model: any model; nothing is computed with it.
        overrides: as for ``classify``.
        ratios: learning-rate ratios to show for the blocks.
        rms: the RMS of each parameter before training; None where it is not known.
        relative_to_init: whether the ratios relate to the initial scale, as with ``relative_to="init"``.
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
    start = _starting_scales(blocks, rms_by_block(rms, whole), ratios, relative_to_init=relative_to_init)
    console = console or Console()
    plain = mistakes_of_names(whole)
    if as_json:
        print(json.dumps(_as_dict(blocks, fused, plain, start), indent=2))
        return
    console.print(_by_block(blocks, start))
    if verbose:
        console.print(_every_parameter(blocks))
    for line in (_ABOUT_SCALES, *_about_fused(fused), *_about_names(plain, len(whole))):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _starting_scales(
    blocks: BlockMap,
    rms: Mapping[Block, float | None],
    ratios: Mapping[Block, float],
    *,
    relative_to_init: bool,
) -> StartingScales:
    try:
        return StartingScales.of(set(blocks.values()), rms, ratios, relative_to_init=relative_to_init)
    except ValueError as error:
        problem = str(error).partition(". Give its scale")[0]
        raise UserError(
            f"--{problem.replace('_', '-', 1)}; leave out --relative-to to show the ratios as they are"
        ) from None


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


def _by_block(blocks: BlockMap, start: StartingScales) -> Table:
    numbers = ("parameters", "share", "ratio", "RMS", "LR/RMS")
    table = Table(
        "block", *(Column(name, justify="right") for name in numbers), Column("for example", overflow="fold")
    )
    counts = blocks.counts()
    for block, numel in counts.items():
        example = next(name for name in blocks if blocks[name] is block)
        rms, over_rms = start.rms[block], start.lr_over_rms[block]
        table.add_row(
            block.value,
            f"{numel:,}",
            f"{numel / sum(counts.values()):.2%}",
            f"{start.ratios[block]:.4g}",
            "unknown" if rms is None else f"{rms:.2g}",
            "" if over_rms is None else f"{over_rms:.3g}",
            Text(example),
        )
    table.add_row("all", f"{sum(counts.values()):,}", *[""] * 5, style="bold")
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
    blocks: BlockMap, fused: Mapping[str, Assignment], plain: Mapping[str, str], start: StartingScales
) -> dict[str, object]:
    parameters = {
        name: {"block": block.value, "numel": blocks.assignment(name).numel, "reason": blocks.reason(name)}
        for name, block in blocks.items()
    }
    return {
        "blocks": {block.value: numel for block, numel in blocks.counts().items()},
        "ratios": {block.value: ratio for block, ratio in start.ratios.items()},
        "initial_rms": {block.value: rms for block, rms in start.rms.items()},
        "lr_over_initial_rms": {block.value: value for block, value in start.lr_over_rms.items()},
        "parameters": parameters,
        "fused": {
            name: {p: b.value for p, b in (entry.parts or {}).items()} for name, entry in fused.items()
        },
        "mistakes_of_plain_names": dict(plain),
    }
