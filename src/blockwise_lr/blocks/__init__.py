"""Which block does a parameter belong to?"""

from blockwise_lr.blocks.block import Block, BlockMap, canonical_name
from blockwise_lr.blocks.classify import classify
from blockwise_lr.blocks.fused import merge_fused, split_fused
from blockwise_lr.blocks.interleaved import Layout
from blockwise_lr.blocks.registered import register_rule
from blockwise_lr.blocks.stated import register_layout

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
