"""Finding the matrices that map to the vocabulary: the output heads of a model.

A matrix with as many outputs as there are tokens need not be a head: in a small vocabulary any matrix may have that
shape. What the model itself says comes first, then a weight shared with the embedding, and then the size, where a
place outside of all layers makes it sure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from torch import nn

from blockwise_lr.blocks.places import Places
from blockwise_lr.blocks.topology import CONVOLUTIONS, Tree, matrix_shape, table_shape

_ADAPTED = re.compile(r"\.(base_layer|original_module|modules_to_save\.\w+)$")
# Attributes in which modules that are no linear layer keep the width of what they read.
_WIDTHS = (
    "num_features",
    "num_channels",
    "in_channels",
    "input_size",
    "hidden_size",
    "embed_dim",
    "kdim",
    "vdim",
)


def without_adapter(path: str) -> str:
    """The path of a module before PEFT wrapped it.

    Example:
        >>> without_adapter("model.lm_head.base_layer"), without_adapter("score.modules_to_save.default")
        ('model.lm_head', 'score')
    """
    return _ADAPTED.sub("", path)


def find_heads(
    tree: Tree, places: Places, vocabularies: Collection[int], attention: Collection[str], asked: bool
) -> set[str]:
    """The output heads that the model does not declare, known by their size and their place.

    The size is proof where nothing in the model reads that many inputs and no other matrix beside the embedding has
    it. Where something does (a vocabulary as large as the model is wide), a head is the one matrix of that size beside
    the embedding, and the last matrix of the model.

    Args:
        tree: the model's modules.
        places: their places.
        vocabularies: how many tokens the embeddings have.
        attention: the matrices of attentions, which are no heads.
        asked: whether the model has `get_output_embeddings`, which then knows better than an ambiguous size.

    Returns:
        Paths, without those that PEFT adds.
    """
    fitting = [
        path
        for path, module in tree.modules.items()
        if (shape := matrix_shape(module)) is not None
        and shape[1] in vocabularies
        and path not in attention
        and _ADAPTED.search(path) is None
        and _ends(tree, path)
    ]
    read = set(_widths_read(tree))
    sure = {path for path in fitting if _outputs(tree, path) not in read}
    found = {path for path in fitting if _is_last_of_head(tree, places, path, path in sure)}
    beside = [path for path in fitting if not places.in_layer(path) and places.model_of(path) is not None]
    groups = {_group(tree, path) for path in beside}
    if len(groups) == 1:
        alone = (
            len(beside) == 1
            and not asked
            and not _matrices_after(tree, beside[0], places.model_of(beside[0]) or "")
        )
        if alone or sure.issuperset(beside):
            found.update(beside)
    elif not groups:
        found.update(p for p in sure if not places.in_layer(p) and not _matrices_after(tree, p, ""))
    return found


def _outputs(tree: Tree, path: str) -> int:
    return tree.shape(path)[1]


def _ends(tree: Tree, path: str) -> bool:
    """Whether a module is not followed by others in an nn.Sequential around it."""
    around = path.rpartition(".")[0]
    if not path or not isinstance(tree.modules[around], nn.Sequential):
        return True
    return [child for child in tree.children[around] if child in tree.holders][-1:] == [path]


def _is_last_of_head(tree: Tree, places: Places, path: str, sure: bool) -> bool:
    """Whether a module is the last matrix in a module of a class named as a head, or in an nn.Sequential."""
    around = path.rpartition(".")[0]
    module = tree.modules[around]
    named = type(module).__name__.endswith("Head") or (sure and isinstance(module, nn.Sequential))
    if not path or not named or around in places.around_table or around in places.around_attention:
        return False
    inside = [p for p in tree.modules if p.startswith(f"{around}." if around else "") and tree.is_matrix(p)]
    return inside[-1] == path and (sure or not places.in_layer(path))


def _group(tree: Tree, path: str) -> str:
    """The list of matrices of which a module is an item, heads side by side; otherwise its own path."""
    around = path.rpartition(".")[0]
    is_list = path and isinstance(tree.modules[around], (nn.ModuleList, nn.ModuleDict))
    return around if is_list and all(map(tree.is_matrix, tree.children[around])) else path


def _matrices_after(tree: Tree, path: str, model: str) -> bool:
    """Whether a matrix of the model is registered after this one."""
    inside = (p for p in tree.modules if not model or p.startswith(f"{model}."))
    matrices = [p for p in inside if tree.is_matrix(p) and _ADAPTED.search(p) is None]
    return matrices[-1] != path


def _widths_read(tree: Tree) -> Iterator[int]:
    """How many inputs the modules take: a head's outputs are taken by none of them."""
    for module in tree.modules.values():
        if (shape := matrix_shape(module)) is not None:
            yield shape[0]
            continue
        yield from (size for name in _WIDTHS if isinstance(size := module.__dict__.get(name), int))
        if (table := table_shape(module)) is not None:
            yield table[1]
        elif not isinstance(module, (nn.ParameterDict, nn.ParameterList, *CONVOLUTIONS)):
            own = ((leaf, p) for leaf, p in module._parameters.items() if p is not None and p.ndim)
            yield from (p.shape[-1] for leaf, p in own if not leaf.endswith("bias"))
