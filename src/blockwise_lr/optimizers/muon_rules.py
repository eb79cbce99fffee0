"""Which parameters Muon updates itself, and which it leaves to AdamW."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from blockwise_lr.blocks import Block
from blockwise_lr.optimizers.added_groups import name_in_group

Algorithm = Literal["muon", "adamw"]

_MATRICES = (Block.QK, Block.VO, Block.FFN)


def algorithm_of(
    block: Block | str, shape: Sequence[int], *, min_side: int = 8, fused: str = "the weight"
) -> tuple[Algorithm, str]:
    """Return the algorithm that updates a parameter, and the reason in words.

    Args:
        block: the block of the parameter.
        shape: the shape of the whole parameter, not of a shard.
        min_side: matrices with a smaller side are updated by AdamW. Default 8.
        fused: name of a fused weight in the error message.

    Raises:
        ValueError: the parameter is a fused QKV weight. Q, K and V are three matrices, and Muon orthogonalises each
            matrix separately.

    Example:
        >>> algorithm_of("ffn", (64, 16)), algorithm_of("norm", (16,))[0]
        (('muon', 'a matrix of ffn'), 'adamw')
    """
    block, sides = Block(block), len(shape)
    if block is Block.QKV and sides > 1:
        raise ValueError(
            f"{fused} is a fused QKV weight, and Muon orthogonalises every matrix by itself: call split_fused(model) "
            "first, before the optimizer is made"
        )
    if block not in _MATRICES:
        return "adamw", f"in {block}, which is none of {', '.join(_MATRICES)}"
    if sides < 2:
        return "adamw", "a vector"
    if sides > 3 or (sides == 3 and block is not Block.FFN):
        return (
            "adamw",
            f"{sides} dimensions in {block}: a convolution, or matrices in a layout that is not known",
        )
    if min(shape[-2:]) < min_side:
        return (
            "adamw",
            f"its smaller side is {min(shape[-2:])}: a convolution's kernel, or a matrix below {min_side}",
        )
    return "muon", f"a matrix of {block}" if sides == 2 else f"a stack of {shape[0]} matrices of {block}"


def divide_by_algorithm(group: dict[str, Any], min_side: int) -> Iterator[dict[str, Any]]:
    """Yield the non-empty parts of a group, that of Muon first.

    Args:
        group: the group, with its parameters as a list. A group that has ``algorithm`` is yielded unchanged.
        min_side: as in :func:`algorithm_of`.

    Raises:
        ValueError: the group has neither block nor a known algorithm, or contains a fused QKV weight.
    """
    if "algorithm" in group:
        if group["algorithm"] not in ("muon", "adamw"):
            raise ValueError(f'a group\'s algorithm is {group["algorithm"]!r}; expected "muon" or "adamw"')
        yield group
        return
    if "block" not in group:
        raise ValueError(
            "Muon got parameters without a block: make the groups with param_groups(model, lr), or give each "
            '"algorithm": "muon" or "adamw"'
        )
    parameters = list(group["params"])
    names = group.get("names", [""] * len(parameters))
    rules = [
        algorithm_of(group["block"], p.shape, min_side=min_side, fused=name or "a parameter")[0]
        for name, p in zip(names, parameters)
    ]
    for algorithm in ("muon", "adamw"):
        mine = [i for i, rule in enumerate(rules) if rule == algorithm]
        if mine:
            part = {**group, "algorithm": algorithm, "params": [parameters[i] for i in mine]}
            for each in ("names", "output_dims"):  # keys with one entry per parameter
                if each in group:
                    part[each] = [group[each][i] for i in mine]
            yield part


def check_outputs_are_known(group: dict[str, Any]) -> None:
    """Check that each matrix of a group says which of its dimensions counts the outputs.

    Args:
        group: a group that Muon updates with ``adjust_lr_fn="original"``, where the scale depends on it.

    Raises:
        ValueError: a matrix that is not square does not.
    """
    if "output_dims" in group or "block" not in group:
        return
    for i, parameter in enumerate(group["params"]):
        if parameter.shape[-2] != parameter.shape[-1]:
            raise ValueError(
                f'Muon with adjust_lr_fn="original" scales {name_in_group(group, i)} of shape '
                f"{tuple(parameter.shape)} by its outputs over its inputs, and its group does not say which dimension "
                "counts the outputs; expected a group of blockwise_lr.param_groups, for parameters that are still "
                "those of the model: make the groups with param_groups(model, lr), or give this group `output_dims`, "
                "the dimension for each parameter (0 for the weight of a Linear, 1 for that of a Conv1D)"
            )
