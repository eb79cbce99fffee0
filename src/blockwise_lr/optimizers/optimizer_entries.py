"""The optimizers that can be chosen by name: their import paths and default settings."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch.optim import Optimizer

from blockwise_lr.extras import missing


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
