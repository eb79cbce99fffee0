"""Assign each parameter to its block type, and split fused attention weights."""

from blockwise_lr.blocks.block import Block, BlockMap, canonical_name
from blockwise_lr.blocks.classify import classify
from blockwise_lr.blocks.fused import merge_fused, split_fused
from blockwise_lr.blocks.layout import Layout
from blockwise_lr.blocks.user_layouts import register_layout
from blockwise_lr.blocks.user_rules import register_rule

__all__ = [
    "Block",
    "BlockMap",
    "Layout",
    "canonical_name",
    "classify",
    "merge_fused",
    "register_layout",
    "register_rule",
    "split_fused",
]
