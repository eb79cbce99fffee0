"""Gradient clipping by block inside transformers' Trainer, replacing Trainer's own clipping."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from blockwise_lr.extras import MINIMUM, explained

try:
    from transformers import Trainer
except ModuleNotFoundError as error:
    raise explained(error, "clipping in transformers' Trainer needs") from None

from blockwise_lr.blocks import Block
from blockwise_lr.optim.clipping import MaxNorm, refuse_unsplit, resolve_max_norm, scale_gradients
from blockwise_lr.optim.gradients import (
    GradientNorms,
    gradient_norms,
    parameters_with_gradients,
    stack_scalars,
)

_HOOKS = ("_clip_grad_norm", "_get_grad_norm")
_SHOWN = 3  # number of parameters per block that the warning names
_UNREAD = 64  # steps whose norms are kept until they are read; each step holds one number per parameter


class TrainerClipping:
    """Clip the gradients of each step by block, and keep the norms on the device until Trainer logs.

    Args:
        max_norm: the largest norm of each block, as in :func:`blockwise_lr.clip_grad_norm_by_block`.

    Raises:
        ValueError: as :func:`blockwise_lr.clip_grad_norm_by_block`.
        RuntimeError: the installed version of transformers lacks the methods that clipping by block overrides.
    """

    def __init__(self, max_norm: MaxNorm) -> None:
        missing = [hook for hook in _HOOKS if not hasattr(Trainer, hook)]
        if missing:
            raise RuntimeError(
                f"clip_by_block overrides Trainer.{missing[0]}, which this version of transformers does not have, so "
                "it would clip globally: leave clip_by_block out, or "
                f"pip install 'transformers>={MINIMUM['transformers']}'"
            )
        self._limits = resolve_max_norm(max_norm, "clip_by_block")
        self._unread: list[tuple[int, GradientNorms]] = []
        self._last: GradientNorms | None = None
        self._nonfinite: tuple[int, dict[Block, list[str]]] | None = None  # first since the last read()

    def clip(
        self, model: Any, groups: Sequence[Mapping[str, Any]], step: int, *, leave_nonfinite: bool = False
    ) -> Tensor:
        """Clip the gradients of the optimizer's groups in place.

        Args:
            model: the model, wrapped as Trainer holds it.
            groups: the optimizer's groups, as built by :func:`blockwise_lr.param_groups`.
            step: number of optimizer steps taken so far.
            leave_nonfinite: leave a gradient whose norm is not finite unscaled, and do not record it. This check
                causes a host sync.

        Returns:
            The norm of the whole gradient before clipping.
        """
        found = parameters_with_gradients(model, groups)
        refuse_unsplit(found, self._limits)
        norms = gradient_norms(found)
        if not (leave_nonfinite and not math.isfinite(norms.total)):
            scale_gradients(found, norms, self._limits)
            self._last = norms
            self._unread.append((step, norms))
            if len(self._unread) >= _UNREAD:  # Trainer logs rarely or never
                self._find_nonfinite(stack_scalars([each.total for _, each in self._unread]).tolist())
        return norms.total

    def read(self, *, warn: bool) -> dict[Block, float]:
        """Return the gradient norm of each block at the last step. Causes one host sync.

        Args:
            warn: warn about the first step since the last call whose gradient was not finite.
        """
        unread = self._unread if warn else []
        by_block = {} if self._last is None else self._last.by_block
        numbers = stack_scalars([*(norms.total for _, norms in unread), *by_block.values()]).tolist()
        if warn:
            self._find_nonfinite(numbers)
            if self._nonfinite is not None:
                warnings.warn(_describe(*self._nonfinite), stacklevel=2)
        self._nonfinite = None
        self._unread = []
        return dict(zip(by_block, numbers[len(unread) :]))

    def _find_nonfinite(self, totals: Sequence[float]) -> None:
        """Reduce the unread norms to the first step whose gradient was not finite.

        Args:
            totals: norms of the whole gradients of the unread steps, in order.
        """
        if self._nonfinite is None:  # later non-finite steps usually result from the first one
            for (step, norms), total in zip(self._unread, totals):
                if not math.isfinite(total) and (found := norms.nonfinite()):
                    self._nonfinite = (step, found)
                    break
        self._unread = []


def check_engine(kind: str, *, fsdp2: bool) -> None:
    """Check that the training engine exposes the gradients of single parameters, as tensors or DTensors.

    Args:
        kind: accelerate's ``DistributedType``.
        fsdp2: whether "FSDP" means version 2.

    Raises:
        ValueError: the engine hides the gradients of single parameters.
    """
    if hides_parameters(kind, fsdp2=fsdp2):
        name = "FSDP version 1" if kind == "FSDP" else str(kind).removeprefix("DistributedType.")
        raise ValueError(
            f"clip_by_block cannot see the gradients of single parameters under {name}; it works on one device, under "
            "DDP and under FSDP version 2: use one of these, or max_grad_norm in its place"
        )


def hides_parameters(kind: str, *, fsdp2: bool) -> bool:
    """Return whether an engine of accelerate hides single parameters and gradients from this library.

    Args:
        kind: accelerate's ``DistributedType``.
        fsdp2: whether "FSDP" means version 2.
    """
    return kind in ("DEEPSPEED", "MEGATRON_LM", "XLA") or (kind == "FSDP" and not fsdp2)


def _describe(step: int, found: Mapping[Block, Sequence[str]]) -> str:
    """Return the warning about a non-finite gradient.

    Args:
        step: optimizer steps taken before.
        found: the parameters with non-finite gradients by block; empty for a block whose norm overflowed.
    """
    descriptions = []
    for block, names in found.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        descriptions.append(
            f"{block.value}: {', '.join(names[:_SHOWN]) or 'finite, but too large to square'}{more}"
        )
    return f"the gradient of step {step + 1} was not finite. {'; '.join(descriptions)}"
