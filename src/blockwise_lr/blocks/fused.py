"""split_fused / merge_fused: the q, k and v of a fused weight as parameters of their own, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import type_before_parametrizations

from blockwise_lr.arguments import check_model
from blockwise_lr.blocks.layout import (
    Concatenation,
    any_sharded,
    merge_module,
    parts_of,
    split_module,
    split_state,
)
from blockwise_lr.blocks.model import ModelFacts
from blockwise_lr.blocks.projection import PART_WORDS, Projection
from blockwise_lr.blocks.stated import Stated

ModelT = TypeVar("ModelT", bound=nn.Module)

_WAYS = (
    "Prove the layout by a batch that the model takes: split_fused(model, example=batch)",
    'or state it: split_fused(model, layout="q k v") if all rows of the queries come first, then the keys, then the '
    'values; layout="q k v per head" if they lie head by head',
)
# Wrappers that keep track of the parameters (by class name: torch.distributed need not be imported).
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule"}


def split_fused(model: ModelT, *, example: Any = None, layout: Stated | None = None) -> ModelT:
    """Make the q, k and v of every fused attention weight and bias parameters of their own, in place.

    A param group cannot hold a part of a parameter, so a fused weight cannot give q, k and v different
    learning rates. Here it is computed from its parts (`torch.nn.utils.parametrize`): `...weight` stays
    readable, and the parameters become `...parametrizations.weight.original0` (q), `original1` (k),
    `original2` (v). Outputs are unchanged to the bit, gradients of the parts are the slices of the fused
    gradient, `requires_grad` is kept.

    Where it goes: after the weights are initialised or loaded; before the optimizer (a group made earlier
    holds the old parameter: that cannot be noticed here), before Trainer, DDP, FSDP and torch.compile.

    `state_dict()` and `load_state_dict()` keep the original layout, to the bit and in order, so checkpoints
    do not show the split; sharded parts (DTensor) keep the split layout. A split model can be deep-copied but
    not pickled. Calling it again changes nothing, nor does a model without fused weights.

    How the parts lie in a fused weight is known for `nn.MultiheadAttention` and for many classes of transformers and
    timm. For any other class it is proved: a copy of the attention runs once on random numbers, or the model on
    random tokens, and autograd says which rows move the queries, the keys and the values.

    A split weight is not a parameter any more, but writes into it (`nn.init`, `weight.data += delta`, a tensor of
    `state_dict()`) reach the parts.

    Args:
        model: any module.
        example: a batch that the model takes, for a proof where the attention cannot run alone: a mapping is given
            as keywords, a tuple as arguments, anything else as the one argument. The model runs once in eval mode;
            its modes, buffers and the random numbers are as before. Default: none.
        layout: what you know of the layouts that are not known: "q k v", "q k v per head", "q k v per group" or
            ``Layout(parts, repeats)``, as in :func:`register_layout`; or a mapping from a regular expression,
            searched in the weight's name, or the attention's class, to one of these, which then comes before all
            that is known. Default: none.

    Returns:
        The same model.

    Raises:
        ValueError: the layout of a fused weight is neither known nor proved nor stated, it is shared between modules,
            or already parametrized or sharded, or the model is already wrapped in DDP, FSDP or torch.compile; the
            example cannot be run, or the layout does not fit. Nothing has been changed then.

    Example:
        >>> attention = split_fused(nn.MultiheadAttention(8, num_heads=2, bias=False))
        >>> [name for name, _ in attention.named_parameters()][-1], attention.in_proj_weight.shape
        ('parametrizations.in_proj_weight.original2', torch.Size([24, 8]))
    """
    check_model(model, "split_fused")
    facts = ModelFacts(model, layout=layout, example=example)
    plan = dict(_fused_weights(facts))
    _refuse_what_cannot_be_split(model, facts, plan)
    by_module: dict[str, dict[str, Concatenation]] = {}
    for (path, leaf), projection in plan.items():
        names, sizes = zip(*projection.parts)
        repeats = projection.repeats or 1
        by_module.setdefault(path, {})[leaf] = Concatenation(names, sizes, projection.dim, repeats)
    for path, concatenations in by_module.items():
        split_module(facts.tree.modules[path], concatenations)
    return model


def merge_fused(model: ModelT) -> ModelT:
    """Undo :func:`split_fused`, in place: original parameters, state_dict keys, order and values, to the bit.

    Call it when training is over, or never: `state_dict()` has the original layout either way. The fused
    parameters are new objects without gradients; an optimizer made for the parts does not know them.

    Args:
        model: a split model; an unsplit one is returned unchanged.

    Returns:
        The same model.

    Raises:
        ValueError: a part is sharded (DTensor): load the full state into an unsharded split model first.
    """
    check_model(model, "merge_fused")
    modules = model.named_modules()
    split = [(name, module, state) for name, module in modules if (state := split_state(module)) is not None]
    for name, module, state in split:
        for leaf in state.leaves:
            if any_sharded(parts_of(module, leaf)):
                raise ValueError(
                    f"{_join(name, leaf)} is sharded (its parts are DTensors) and cannot be merged in place; "
                    "load the full state dict into an unsharded split model and merge that"
                )
    for _, module, _ in split:
        merge_module(module)
    return model


def _fused_weights(facts: ModelFacts) -> Iterator[tuple[tuple[str, str], Projection]]:
    """The fused parameters that are not split yet, each module once."""
    seen: set[tuple[int, str]] = set()
    for (path, leaf), projection in facts.projections.items():
        module = facts.tree.modules[path]
        present = module._parameters.get(leaf) is not None or parametrize.is_parametrized(module, leaf)
        state = split_state(module)
        done = state is not None and leaf in state.leaves
        if projection.fused and present and not done and (id(module), leaf) not in seen:
            seen.add((id(module), leaf))
            yield (path, leaf), projection


def _refuse_what_cannot_be_split(
    model: nn.Module, facts: ModelFacts, plan: dict[tuple[str, str], Projection]
) -> None:
    problems, unknown = [], False
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for param in module._parameters.values():
            owners.setdefault(id(param), set()).add(id(module))
    for (path, leaf), projection in plan.items():
        module = facts.tree.modules[path]
        param = module._parameters.get(leaf)
        if param is None:
            problems.append((path, leaf, "it is already parametrized by something else: split before that"))
        elif any_sharded([param]):
            problems.append((path, leaf, "it is sharded (a DTensor): call split_fused before fully_shard"))
        elif len(owners[id(param)]) > 1:
            problems.append((path, leaf, "several modules share it, and splitting would separate them"))
        elif projection.repeats is None:
            of_class = type_before_parametrizations(facts.tree.modules[projection.attention]).__name__
            why = facts.unproved.get((path, leaf), "its attention does not say how many heads it has")
            unknown = True
            problems.append(
                (
                    path,
                    leaf,
                    f"how {_parts(projection)} lie in it is not known for the class {of_class}: {why}",
                )
            )
        elif param.shape[projection.dim] != (total := sum(size for _, size in projection.parts)):
            shape = tuple(param.shape)
            problems.append(
                (path, leaf, f"its shape is {shape}; expected {total} in dimension {projection.dim}")
            )
    if problems:
        lines = [f"  {_join(path, leaf)}: {problem}" for path, leaf, problem in problems]
        raise ValueError(
            "\n".join(
                [
                    "split_fused cannot split these fused weights (nothing was changed):",
                    *lines,
                    *(_WAYS if unknown else ()),
                    "Without splitting, give the whole weight one block: "
                    'classify(model, overrides={r"NAME": Block.VO})',
                ]
            )
        )
    wrappers = {c.__name__ for m in model.modules() for c in type(m).__mro__} & _WRAPPERS if plan else set()
    if wrappers:
        raise ValueError(
            f"the model is already wrapped in {', '.join(sorted(wrappers))}, which keeps track of the "
            "unsplit parameters; call split_fused(model) before wrapping it"
        )


def _parts(projection: Projection) -> str:
    return " and ".join(PART_WORDS[part] for part, _ in projection.parts)


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf
