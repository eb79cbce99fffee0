"""What `blockwise-lr inspect` shows: the blocks of a preset's model, without allocating it."""

from __future__ import annotations

import json

import torch
from rich.console import Console
from rich.table import Column, Table

from blockwise_lr.blocks import Block, BlockMap, classify, split_fused
from blockwise_lr.optim.ratios import PAPER_RATIOS
from blockwise_lr.pretrain.config import ModelConfig
from blockwise_lr.pretrain.models import build_model


def inspect_model(
    config: ModelConfig, *, verbose: bool, as_json: bool, console: Console | None = None
) -> None:
    """Print the blocks of the model of `config`, after `split_fused`: a table, every parameter's reason, or JSON.

    Args:
        verbose: every parameter with its reason instead of one row a block.
        as_json: JSON with both.
        console: where to. Default: stdout.
    """
    with torch.device("meta"):
        model = split_fused(build_model(config, seed=0))
    blocks = classify(model)
    console = console or Console()
    if as_json:
        parameters = {
            name: {
                "block": block.value,
                "numel": blocks.assignment(name).numel,
                "reason": blocks.reason(name),
            }
            for name, block in blocks.items()
        }
        counts = {block.value: numel for block, numel in blocks.counts().items()}
        print(json.dumps({"blocks": counts, "parameters": parameters}, indent=2))
    else:
        console.print(_every_parameter(blocks) if verbose else _by_block(blocks))


def _by_block(blocks: BlockMap) -> Table:
    table = Table("block", "parameters", "share", "paper's ratio", Column("for example", overflow="fold"))
    for column in table.columns[1:4]:
        column.justify = "right"
    counts = blocks.counts()
    for block, numel in counts.items():
        example = next(name for name in blocks if blocks[name] is block)
        share = f"{numel / sum(counts.values()):.2%}"
        table.add_row(block.value, f"{numel:,}", share, f"{PAPER_RATIOS.get(Block(block), 1):g}", example)
    table.add_row("all", f"{sum(counts.values()):,}", "", "", "", style="bold")
    return table


def _every_parameter(blocks: BlockMap) -> Table:
    table = Table("parameter", "block", "elements", "why")
    for name in blocks:
        table.add_row(name, blocks[name].value, f"{blocks.assignment(name).numel:,}", blocks.reason(name))
    return table
