"""Find the sequence mixers other than attention: those with a state or a convolution."""

from __future__ import annotations

import re
from collections.abc import Collection

from blockwise_lr.blocks.nesting import Nesting
from blockwise_lr.blocks.topology import CONVOLUTIONS, Tree

_STATE = re.compile(r"A_log|dt_bias|time_decay|recurrent_param")


def find_mixers(tree: Tree, attentions: Collection[str], nesting: Nesting) -> set[str]:
    """Return the paths of the mixers with a state or a convolution: Mamba, RWKV, linear attention, Hyena and others.

    A recurrence without a matrix, and the gate of a linear attention, belong to the mixer that contains them. A module
    that contains an attention is a layer or a stack, not a mixer.

    Args:
        tree: the modules of the model.
        attentions: paths of the attention modules.
        nesting: which modules contain attentions and embeddings.
    """
    found: set[str] = set()
    for path, module in tree.modules.items():
        if any(_STATE.fullmatch(name) for name in module._parameters):
            found.add(path)
            around = path.rpartition(".")[0]
            if around in attentions or not tree.matrices(path):
                found.add(around)
        elif any(isinstance(m, CONVOLUTIONS) for m in module._modules.values()):
            children = {child.rpartition(".")[2] for child in tree.children.get(path, ())}
            if {"in_proj", "out_proj"} <= children:
                found.add(path)
    return found - nesting.around_attention - nesting.around_table
