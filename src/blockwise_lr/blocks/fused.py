"""split_fused and merge_fused: make q, k and v of a fused weight separate parameters, and undo it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import type_before_parametrizations

from blockwise_lr.arguments import check_model
from blockwise_lr.blocks.layout import PART_WORDS, Projection
from blockwise_lr.blocks.model_facts import ModelFacts
from blockwise_lr.blocks.split_weights import merge_module, split_module
from blockwise_lr.blocks.user_layouts import LayoutArgument
from blockwise_lr.blocks.weight_parts import FusedWeight, any_sharded, parts_of, split_state

ModelT = TypeVar("ModelT", bound=nn.Module)

_REMEDIES = (
    "Prove the layout by a batch that the model takes: split_fused(model, example=batch)",
    'or state it: split_fused(model, layout="q k v") if all rows of the queries come first, then the keys, then the '
    'values; layout="q k v per head" if they lie head by head',
)
# Wrappers that keep track of the parameters. They are known by class name, so torch.distributed is not imported.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule"}


def split_fused(model: ModelT, *, example: Any = None, layout: LayoutArgument | None = None) -> ModelT:
    """Split every fused attention weight and bias into separate parameters for q, k and v, in place.

    A param group cannot hold a part of a parameter, so a fused weight cannot give q, k and v different learning rates.
    This function makes the parts parameters and computes the weight from them (`torch.nn.utils.parametrize`):
    `...weight` stays readable, and the parameters are `...parametrizations.weight.original0` (q), `original1` (k) and
    `original2` (v). Outputs are unchanged to the bit. The gradients of the parts are slices of the fused gradient.
    `requires_grad` is kept.

    Call it after the weights are initialised or loaded, and before you build the optimizer, Trainer, DDP, FSDP or
    torch.compile. An optimizer built earlier holds the old parameters; this function cannot detect that.

    `state_dict()` and `load_state_dict()` keep the original layout, to the bit and in order, so checkpoints do not show
    the split. Sharded parts (DTensors) keep the split layout. A split model can be deep-copied but not pickled. A
    second call changes nothing, nor does a call on a model without fused weights.

    The layout of a fused weight is known for `nn.MultiheadAttention` and for many classes of transformers and timm. For
    any other class, this function finds it by a run: a copy of the attention runs once on random numbers, or the model
    runs once on random tokens. Autograd then shows which rows affect the queries, the keys and the values.

    A split weight is no longer a parameter. Writes into it (`nn.init`, `weight.data += delta`, a tensor of
    `state_dict()`) still reach the parts.

    Args:
        model: any module.
        example: a batch for the model, in case the attention cannot run alone. A mapping is passed as keywords, a
            tuple as arguments, anything else as the only argument. The model runs once in eval mode; its modes, its
            buffers and the random state are restored. Default: none.
        layout: the layout of the weights whose layout is unknown: "q k v", "q k v per head", "q k v per group" or
            ``Layout(parts, repeats)``, as in :func:`register_layout`. Or a mapping to such layouts; a key is an
            attention class or a regular expression, searched in the weight's name. A mapping overrides known
            layouts, too.
            Default: none.

    Returns:
        The same model.

    Raises:
        ValueError: the layout of a fused weight is unknown; the weight is shared between modules, or already
            parametrized or sharded; the model is already wrapped in DDP, FSDP or torch.compile; the model does not
            run on the example; or the stated layout does not fit. The model is then unchanged.

    Example:
        >>> attention = split_fused(nn.MultiheadAttention(8, num_heads=2, bias=False))
        >>> [name for name, _ in attention.named_parameters()][-1], attention.in_proj_weight.shape
        ('parametrizations.in_proj_weight.original2', torch.Size([24, 8]))
    """
    check_model(model, "split_fused")
    facts = ModelFacts(model, layout=layout, example=example)
    plan = dict(_fused_weights(facts))
    _refuse_what_cannot_be_split(model, facts, plan)
    by_module: dict[str, dict[str, FusedWeight]] = {}
    for (path, leaf), projection in plan.items():
        names, sizes = zip(*projection.parts)
        repeats = projection.repeats or 1
        by_module.setdefault(path, {})[leaf] = FusedWeight(names, sizes, projection.dim, repeats)
    for path, fused in by_module.items():
        split_module(facts.tree.modules[path], fused)
    return model


def merge_fused(model: ModelT) -> ModelT:
    """Undo :func:`split_fused` in place: restore the parameters, state_dict keys, order and values, to the bit.

    You may call it after training, or never: `state_dict()` has the original layout either way. The fused parameters
    are new objects without gradients, so an optimizer built for the parts does not update them.

    Args:
        model: a split model. An unsplit model is returned unchanged.

    Returns:
        The same model.

    Raises:
        ValueError: a part is sharded (DTensor). Load the full state into an unsharded split model first.

    Example:
        >>> model = merge_fused(split_fused(nn.MultiheadAttention(8, num_heads=2)))
        >>> [name for name, _ in model.named_parameters()][0]
        'in_proj_weight'
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
    """Yield the fused parameters that are not split yet, once per module."""
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
    """Raise ValueError, with every problem, unless all weights of the plan can be split."""
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
            why = facts.unresolved.get((path, leaf), "its attention does not say how many heads it has")
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
                    *(_REMEDIES if unknown else ()),
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
