"""Build an optimizer by name or import path, on groups by block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from blockwise_lr.arguments import check_model, check_options
from blockwise_lr.blocks import Block, BlockMap
from blockwise_lr.optim.decay import Decay, NoDecay, WeightDecay, resolve_decay
from blockwise_lr.optim.groups import param_groups
from blockwise_lr.optim.initial_scales import RelativeTo
from blockwise_lr.optim.ratios import DEFAULT_RATIOS, Ratios
from blockwise_lr.optimizers.optimizer_entries import OPTIMIZERS, OptimizerEntry, optimizer_entry

__all__ = [
    "OPTIMIZERS",
    "OptimizerEntry",
    "build_optimizer",
    "optimizer_class",
    "optimizer_entry",
    "resolve_weight_decay",
]


def optimizer_class(
    name: str, *, beta1: float | None = None, beta2: float | None = None, eps: float | None = None
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the class and the keyword arguments of an optimizer.

    The keyword arguments contain neither learning rate nor weight decay; these are in the groups of
    :func:`blockwise_lr.param_groups`.

    Args:
        name: one of :data:`OPTIMIZERS`, or ``module:Class``.
        beta1, beta2, eps: values to use. None (default): the default of the optimizer.

    Raises:
        ValueError: the name is unknown, or the optimizer does not have one of the given options.
        ModuleNotFoundError: the package of the class is missing.

    Example:
        >>> optimizer_class("adamw")[1]
        {'betas': (0.9, 0.95), 'eps': 1e-08, 'fused': True}
    """
    entry = optimizer_entry(name)
    for option, given, default in (
        ("beta1", beta1, entry.beta1),
        ("beta2", beta2, entry.beta2),
        ("eps", eps, entry.eps),
    ):
        if given is not None and default is None:
            raise ValueError(f"optimizer {name} takes no {option} (it is {given:g}): leave it out")
    options: dict[str, Any] = {}
    if entry.betas is not None:
        changed = [own if given is None else given for own, given in zip(entry.betas, (beta1, beta2))]
        options["betas"] = (*changed, *entry.betas[2:])
    if entry.eps is not None:
        options["eps"] = entry.eps if eps is None else eps
    return entry.load(), {**options, **entry.options}


def build_optimizer(
    name: str,
    model: nn.Module,
    lr: float,
    ratios: Ratios = DEFAULT_RATIOS,
    *,
    weight_decay: WeightDecay | None = None,
    no_decay: NoDecay = (),
    decay: Decay = "coupled",
    relative_to: RelativeTo = None,
    blocks: BlockMap | None = None,
    **options: Any,
) -> Optimizer:
    """Return an optimizer by name, with a learning rate per block.

    Args:
        name: one of :data:`OPTIMIZERS`, or the import path of any torch optimizer, ``module:Class``.
        model: the model. If it has fused QKV weights, call ``split_fused(model)`` first.
        lr: base learning rate. Its usual scale differs between optimizers; see ``optimizer_entry(name).lr_factor``.
        ratios, no_decay, decay, relative_to, blocks: as in :func:`blockwise_lr.param_groups`.
        weight_decay: as in :func:`blockwise_lr.param_groups`, with the default of the optimizer in place of 0.1. None
            (default): that default.
        options: constructor arguments that override the defaults (``betas``, ``eps``, ``momentum`` ...).

    Returns:
        The optimizer, on the groups of :func:`blockwise_lr.param_groups`.

    Raises:
        ValueError: as in :func:`optimizer_class` and :func:`blockwise_lr.param_groups`; an option is not a named
            argument of the constructor, even if the constructor accepts any keyword; or a weight decay is given for an
            optimizer that has none.
        ModuleNotFoundError: the package of the class is missing.

    Example:
        >>> model = nn.ModuleDict({"wte": nn.Embedding(16, 4), "ln_f": nn.LayerNorm(4)})
        >>> [(g["block"], g["lr"]) for g in build_optimizer("adafactor", model, 1e-2).param_groups]
        [('norm', 0.06), ('emb', 0.04)]
    """
    check_model(model, "build_optimizer")
    check_options(options, "build_optimizer")
    cls, defaults = optimizer_class(name)
    takes = [key for key, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_KEYWORD]
    unknown = sorted(set(options) - set(takes))
    if unknown:
        raise ValueError(f"optimizer {name} takes no {unknown[0]}; it takes {', '.join(takes[1:])}")
    decays, decay = _resolve_decays(name, weight_decay, decay)
    groups = param_groups(
        model,
        lr,
        ratios,
        weight_decay=decays,
        no_decay=no_decay,
        decay=decay,
        relative_to=relative_to,
        blocks=blocks,
    )
    optimizer = cls(groups, **{**defaults, **options})
    if optimizer_entry(name).needs_graph:
        optimizer.register_step_pre_hook(_refuse_without_graph(name))
    return optimizer


def _refuse_without_graph(name: str) -> Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]:
    """Return a hook that raises RuntimeError if a step has to differentiate gradients that carry no graph."""

    def check(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args[1:], *kwargs.values()]  # args[0] is the optimizer
        if any(each is not None for each in given):
            return  # a closure computes the gradients later; hessian= replaces the second derivative
        every = getattr(optimizer, "update_period", 1)
        taken = optimizer.param_groups[0].get("step", 0)
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        if taken % every == 0 and any(gradient.grad_fn is None for gradient in gradients):
            raise RuntimeError(
                f"optimizer {name} estimates the Hessian from the gradients at every {every}th step, this one among "
                "them, and these gradients carry no graph: write loss.backward(create_graph=True) for such a step "
                f"(step % {every} == 0), or give the estimate yourself, optimizer.step(hessian=...)"
            )

    return check


def resolve_weight_decay(name: str, given: float | None) -> float:
    """Return the weight decay of the groups of an optimizer.

    Args:
        name: one of :data:`OPTIMIZERS`, or ``module:Class``.
        given: the requested weight decay. None: the default of the optimizer.

    Raises:
        ValueError: a weight decay above 0 is given for an optimizer that has none.
    """
    own = optimizer_entry(name).weight_decay
    if given and own is None:
        raise ValueError(_no_weight_decay(name, given))
    return (own or 0.0) if given is None else given


def _resolve_decays(
    name: str, given: WeightDecay | None, decay: Decay
) -> tuple[Mapping[Block, float], Decay]:
    """Return the weight decay of every block of an optimizer, as :func:`resolve_decay` does.

    Raises:
        ValueError: a weight decay above 0 is given for an optimizer that has none.
    """
    own = optimizer_entry(name).weight_decay
    base = own or 0.0
    decays, decay = resolve_decay(base if given is None else given, decay, base)
    if own is None and any(decays.values()):
        raise ValueError(_no_weight_decay(name, given))
    return decays, decay


def _no_weight_decay(name: str, given: object) -> str:
    return f"optimizer {name} takes no weight_decay (it is {given}): set it to 0"
