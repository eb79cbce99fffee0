"""Find the output heads of a model: the matrices that map to the vocabulary.

A matrix with as many outputs as there are tokens need not be a head: if the vocabulary is small, any matrix may have
that shape. So a declaration by the model counts first, then a weight shared with the embedding, and last the size,
and that only where the position outside all layers makes it certain.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from torch import nn

from blockwise_lr.blocks.nesting import Nesting
from blockwise_lr.blocks.topology import CONVOLUTIONS, Tree, matrix_shape, table_shape

_ADAPTED = re.compile(r"\.(base_layer|original_module|modules_to_save\.\w+)$")
# Attributes with the input width of modules that are not linear layers.
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
    """Return the path of a module without the names that PEFT adds.

    Example:
        >>> without_adapter("model.lm_head.base_layer"), without_adapter("score.modules_to_save.default")
        ('model.lm_head', 'score')
    """
    return _ADAPTED.sub("", path)


def find_heads(
    tree: Tree, nesting: Nesting, vocabularies: Collection[int], attention: Collection[str], asked: bool
) -> set[str]:
    """Return the output heads that the model does not declare, by their size and position.

    The size is certain if no module reads that many inputs and no other matrix has as many outputs. Otherwise, for
    example in a vocabulary as large as the model's width, a head must be the only matrix of this size next to the
    embedding, and the last matrix of the model.

    Args:
        tree: the modules of the model.
        nesting: their positions.
        vocabularies: numbers of tokens of the embeddings.
        attention: paths of the attentions' matrices, which are not heads.
        asked: whether the model has `get_output_embeddings`. If so, an ambiguous size is not enough.

    Returns:
        Paths, without the names that PEFT adds.
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
    certain = {path for path in fitting if _outputs(tree, path) not in read}
    found = {path for path in fitting if _is_last_of_head(tree, nesting, path, path in certain)}
    outside = [path for path in fitting if not nesting.in_layer(path) and nesting.model_of(path) is not None]
    groups = {_group(tree, path) for path in outside}
    if len(groups) == 1:
        alone = (
            len(outside) == 1
            and not asked
            and not _matrices_after(tree, outside[0], nesting.model_of(outside[0]) or "")
        )
        if alone or certain.issuperset(outside):
            found.update(outside)
    elif not groups:
        found.update(p for p in certain if not nesting.in_layer(p) and not _matrices_after(tree, p, ""))
    return found


def _outputs(tree: Tree, path: str) -> int:
    return tree.shape(path)[1]


def _ends(tree: Tree, path: str) -> bool:
    """Return whether no module with parameters follows this one in its nn.Sequential, if it is in one."""
    around = path.rpartition(".")[0]
    if not path or not isinstance(tree.modules[around], nn.Sequential):
        return True
    return [child for child in tree.children[around] if child in tree.holders][-1:] == [path]


def _is_last_of_head(tree: Tree, nesting: Nesting, path: str, certain: bool) -> bool:
    """Return whether a module is the last matrix in a module of a class `...Head`, or in an nn.Sequential."""
    around = path.rpartition(".")[0]
    module = tree.modules[around]
    named = type(module).__name__.endswith("Head") or (certain and isinstance(module, nn.Sequential))
    if not path or not named or around in nesting.around_table or around in nesting.around_attention:
        return False
    inside = [p for p in tree.modules if p.startswith(f"{around}." if around else "") and tree.is_matrix(p)]
    return inside[-1] == path and (certain or not nesting.in_layer(path))


def _group(tree: Tree, path: str) -> str:
    """Return the path of the list that contains a matrix among other matrices; otherwise the matrix's own path."""
    around = path.rpartition(".")[0]
    is_list = path and isinstance(tree.modules[around], (nn.ModuleList, nn.ModuleDict))
    return around if is_list and all(map(tree.is_matrix, tree.children[around])) else path


def _matrices_after(tree: Tree, path: str, model: str) -> bool:
    """Return whether the model has a matrix that is registered after this one."""
    inside = (p for p in tree.modules if not model or p.startswith(f"{model}."))
    matrices = [p for p in inside if tree.is_matrix(p) and _ADAPTED.search(p) is None]
    return matrices[-1] != path


def _widths_read(tree: Tree) -> Iterator[int]:
    """Yield the numbers of inputs that modules take. No module takes the outputs of a head."""
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
