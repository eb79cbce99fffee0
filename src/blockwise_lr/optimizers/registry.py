"""Build an optimizer by name or import path, on groups by block."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from blockwise_lr.arguments import check_model, check_options
from blockwise_lr.blocks import BlockMap
from blockwise_lr.extras import missing
from blockwise_lr.optim.decay import NoDecay
from blockwise_lr.optim.groups import param_groups
from blockwise_lr.optim.ratios import PAPER_RATIOS, Ratios


@dataclass(frozen=True)
class OptimizerEntry:
    """The import path and the default settings of one optimizer.

    Args:
        name: value of ``--optimizer``.
        path: import path of the class, ``module:Class``.
        reference: source of the defaults.
        betas, eps: default values. None if the constructor has no such argument (or if eps is not a number).
        weight_decay: default value; None if the constructor has no such argument.
        lr_factor: its usual base learning rate divided by that of AdamW; None if unknown. This is advice and is never
            applied.
        options: other constructor arguments.
        note: half a sentence on further differences from AdamW.
        own_loop: reason why ``train`` cannot run this optimizer; empty if it can.
        needs_graph: whether the optimizer differentiates the gradients, which then require
            ``backward(create_graph=True)``.
    """

    name: str
    path: str
    reference: str
    betas: tuple[float, ...] | None = None
    eps: float | None = None
    weight_decay: float | None = 0.1
    lr_factor: float | None = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    own_loop: str = ""
    needs_graph: bool = False

    @property
    def beta1(self) -> float | None:
        """Default of ``--beta1``."""
        return self.betas[0] if self.betas else None

    @property
    def beta2(self) -> float | None:
        """Default of ``--beta2``."""
        return self.betas[1] if self.betas and len(self.betas) > 1 else None

    def load(self) -> type[Optimizer]:
        """Import and return the class.

        Raises:
            ModuleNotFoundError: its package is missing. The message names the extra to install.
            ValueError: the import path does not exist, or the object is not a torch optimizer.
        """
        module_name, _, attribute = self.path.partition(":")
        sys.path.insert(0, "")  # finds modules in the working directory, as `python -m` does
        try:
            found = getattr(importlib.import_module(module_name), attribute)
        except (Exception, SystemExit) as error:  # importing a user's module can raise any error
            if isinstance(error, ImportError) and module_name == "pytorch_optimizer":
                raise missing(f"optimizer {self.name} needs", "pytorch_optimizer", "optimizers") from None
            raise ValueError(
                f"optimizer {self.name}: {error}; expected module:Class, such as torch.optim:RAdam"
            ) from None
        finally:
            sys.path.remove("")
        if not (isinstance(found, type) and issubclass(found, Optimizer)):
            what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
            raise ValueError(f"optimizer {self.name} is {what}; expected a subclass of torch.optim.Optimizer")
        return found


_ENTRIES = (
    OptimizerEntry(
        "adamw", "torch.optim:AdamW", "arXiv 1711.05101; betas as in arXiv 2502.19002",
        betas=(0.9, 0.95), eps=1e-8, options={"fused": True},
    ),
    OptimizerEntry(
        "nadamw", "torch.optim:NAdam", "Dozat, ICLR 2016 workshop; decay as in arXiv 1711.05101",
        betas=(0.9, 0.95), eps=1e-8, options={"decoupled_weight_decay": True},
    ),
    OptimizerEntry(
        "adafactor", "torch.optim:Adafactor", "arXiv 1804.04235; torch's defaults", weight_decay=0.0, lr_factor=10.0,
        note="steps are relative to a weight's root mean square, and their size is at most 1/sqrt(step)",
    ),
    OptimizerEntry(
        "sgd", "torch.optim:SGD", "Sutskever et al., ICML 2013", weight_decay=0.0, lr_factor=None,
        options={"momentum": 0.9, "nesterov": True}, note="weight decay is added to the gradient",
    ),
    OptimizerEntry(
        "muon", "blockwise_lr.optimizers.muon:Muon", "Jordan et al. 2024; arXiv 2502.16982",
        betas=(0.9, 0.95), eps=1e-8,
        note="matrices of QK, VO and FFN by Muon, the rest by AdamW, whose betas and eps these are",
    ),
    OptimizerEntry(
        "adam-mini", "blockwise_lr.optimizers.adam_mini:AdamMini", "arXiv 2406.16793; betas as in arXiv 2502.19002",
        betas=(0.9, 0.95), eps=1e-8,
        note="half of AdamW's state for float32 parameters; as much for bf16 and fp16 ones",
    ),
    OptimizerEntry(
        "lion", "pytorch_optimizer:Lion", "arXiv 2302.06675; decay as in arXiv 2502.19002's code",
        betas=(0.95, 0.98), weight_decay=1.0, lr_factor=0.1,
    ),
    OptimizerEntry(
        "soap", "pytorch_optimizer:SOAP", "arXiv 2409.11321", betas=(0.95, 0.95), eps=1e-8, weight_decay=0.01,
        note="the first step only sets up the preconditioner",
    ),
    OptimizerEntry(
        "sophia", "pytorch_optimizer:SophiaH", "arXiv 2305.14342", betas=(0.96, 0.99), eps=1e-12, weight_decay=0.002,
        lr_factor=80.0, note="steps are clipped at 0.01 lr, not at lr: hence 100 times the rate and 1/100 of the decay",
        own_loop="it needs loss.backward(create_graph=True), which Trainer does not do: call build_optimizer in a loop "
        "of your own", needs_graph=True,
    ),
    OptimizerEntry(
        "ademamix", "pytorch_optimizer:AdEMAMix", "arXiv 2409.03137", betas=(0.9, 0.999, 0.9999), eps=1e-8,
        options={"alpha": 5.0, "weight_decouple": True},
        note="t_alpha_beta3=STEPS warms its slow momentum up",
    ),
    OptimizerEntry(
        "adan", "pytorch_optimizer:Adan", "arXiv 2208.06677", betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.02,
        lr_factor=5.0, note="decay divides by 1 + lr * decay",
    ),
)  # fmt: skip
_REGISTRY = {entry.name: entry for entry in _ENTRIES}

OPTIMIZERS: tuple[str, ...] = tuple(_REGISTRY)
"""The names that :func:`build_optimizer` and ``--optimizer`` accept, in addition to any ``module:Class``."""


def optimizer_entry(name: str) -> OptimizerEntry:
    """Return the import path and default settings of an optimizer.

    Args:
        name: one of :data:`OPTIMIZERS`, or ``module:Class``, for which the defaults of the constructor are returned.

    Raises:
        ValueError: the name is unknown (the message lists the names), or the path is not that of a torch optimizer.
        ModuleNotFoundError: the package of the class is missing.

    Example:
        >>> optimizer_entry("lion").betas, optimizer_entry("torch.optim:RAdam").betas
        ((0.95, 0.98), (0.9, 0.999))
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    if ":" not in name:
        raise ValueError(
            f"no optimizer named {name!r}; there are {', '.join(OPTIMIZERS)}, and any other by its import path, "
            "module:Class, such as torch.optim:RAdam"
        )
    bare = OptimizerEntry(name, name, "its constructor")
    takes = inspect.signature(bare.load()).parameters
    given = {key: p.default for key, p in takes.items() if p.default is not inspect.Parameter.empty}
    betas, eps, decay = (given.get(key) for key in ("betas", "eps", "weight_decay"))
    return replace(
        bare,
        betas=tuple(betas) if isinstance(betas, (tuple, list)) else None,
        eps=float(eps) if isinstance(eps, (int, float)) else None,
        weight_decay=float(decay) if isinstance(decay, (int, float)) else None,
        lr_factor=None,
    )


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
    ratios: Ratios = PAPER_RATIOS,
    *,
    weight_decay: float | None = None,
    no_decay: NoDecay = (),
    decay: Literal["coupled", "constant"] = "coupled",
    blocks: BlockMap | None = None,
    **options: Any,
) -> Optimizer:
    """Return an optimizer by name, with a learning rate per block.

    Args:
        name: one of :data:`OPTIMIZERS`, or the import path of any torch optimizer, ``module:Class``.
        model: the model. If it has fused QKV weights, call ``split_fused(model)`` first.
        lr: base learning rate. Its usual scale differs between optimizers; see ``optimizer_entry(name).lr_factor``.
        ratios, no_decay, decay, blocks: as in :func:`blockwise_lr.param_groups`.
        weight_decay: as in :func:`blockwise_lr.param_groups`. None (default): the default of the optimizer.
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
        [('norm', 0.01), ('emb', 0.1)]
    """
    check_model(model, "build_optimizer")
    check_options(options, "build_optimizer")
    cls, defaults = optimizer_class(name)
    takes = [key for key, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_KEYWORD]
    unknown = sorted(set(options) - set(takes))
    if unknown:
        raise ValueError(f"optimizer {name} takes no {unknown[0]}; it takes {', '.join(takes[1:])}")
    groups = param_groups(
        model,
        lr,
        ratios,
        weight_decay=resolve_weight_decay(name, weight_decay),
        no_decay=no_decay,
        decay=decay,
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
        raise ValueError(f"optimizer {name} takes no weight_decay (it is {given:g}): leave it out")
    return (own or 0.0) if given is None else given
