"""split_fused / merge_fused: the q, k and v of a fused weight as parameters of their own, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

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

ModelT = TypeVar("ModelT", bound=nn.Module)

# Wrappers that keep track of the parameters (by class name: torch.distributed need not be imported).
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule"}


def split_fused(model: ModelT) -> ModelT:
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

    Args:
        model: any module; weights found by structure are `nn.MultiheadAttention`'s in_proj_weight, GPT-2's
            Conv1D, a Linear that makes q, k, v (rows in this order, grouped-query attention included); those whose
            parts lie head by head are found by their class (:mod:`blockwise_lr.blocks.interleaved`).

    Returns:
        The same model.

    Raises:
        ValueError: the layout of a fused weight is not known, it is shared
            between modules, or already parametrized or sharded, or the model is already wrapped in DDP, FSDP
            or torch.compile. Nothing has been changed then.

    Example:
        >>> attention = split_fused(nn.MultiheadAttention(8, num_heads=2, bias=False))
        >>> [name for name, _ in attention.named_parameters()][-1], attention.in_proj_weight.shape
        ('parametrizations.in_proj_weight.original2', torch.Size([24, 8]))
    """
    check_model(model, "split_fused")
    facts = ModelFacts(model)
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
    problems = []
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
            problems.append((path, leaf, f"how {_parts(projection)} lie in it is not known for this class"))
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
