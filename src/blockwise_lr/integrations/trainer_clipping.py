"""Clipping by block inside transformers' Trainer, in the place of its own."""

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
_SHOWN = 3  # parameters of a block that the warning names
_UNREAD = 64  # steps whose norms are kept until they are read: each holds a number a parameter


class TrainerClipping:
    """Clips each step's gradients, and keeps their norms on the device until Trainer logs.

    Args:
        max_norm: as :func:`blockwise_lr.clip_grad_norm_by_block` takes it.

    Raises:
        ValueError: as that function.
        RuntimeError: this version of transformers lacks the methods that have to be overridden.
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
        self._nonfinite: tuple[int, dict[Block, list[str]]] | None = None  # the first since the last reading

    def clip(
        self, model: Any, groups: Sequence[Mapping[str, Any]], step: int, *, leave_nonfinite: bool = False
    ) -> Tensor:
        """Clip the gradients of the optimizer's groups; returns the norm of the whole gradient before.

        Args:
            model: the model, wrapped as Trainer has it.
            groups: the optimizer's, of :func:`blockwise_lr.param_groups`.
            step: optimizer steps taken before.
            leave_nonfinite: neither scale nor remember a gradient whose norm is not finite, which waits for the device.
        """
        found = parameters_with_gradients(model, groups)
        refuse_unsplit(found, self._limits)
        norms = gradient_norms(found)
        if not (leave_nonfinite and not math.isfinite(norms.total)):
            scale_gradients(found, norms, self._limits)
            self._last = norms
            self._unread.append((step, norms))
            if len(self._unread) >= _UNREAD:  # nothing is logged, or seldom
                self._condense()
        return norms.total

    def read(self, *, warn: bool) -> dict[Block, float]:
        """The norms of the last step, by block.

        Args:
            warn: of the first step since the last reading whose gradient was not finite.
        """
        if warn:
            self._condense()
            if self._nonfinite is not None:
                warnings.warn(_describe(*self._nonfinite), stacklevel=2)
        self._nonfinite = None
        self._unread = []
        if self._last is None:
            return {}
        return {block: float(norm) for block, norm in self._last.by_block.items()}

    def _condense(self) -> None:
        """Replace the unread norms by the first step whose gradient was not finite; waits for the device."""
        if self._nonfinite is None:  # what follows, follows from it
            finite = stack_scalars([norms.total for _, norms in self._unread]).isfinite().tolist()
            for (step, norms), fine in zip(self._unread, finite):
                if not fine and (found := norms.nonfinite()):
                    self._nonfinite = (step, found)
                    break
        self._unread = []


def check_engine(kind: str, *, fsdp2: bool) -> None:
    """Whether gradients are where this library can see them, whole or as DTensors.

    Args:
        kind: accelerate's ``DistributedType``.
        fsdp2: whether "FSDP" is its version 2.

    Raises:
        ValueError: an engine that keeps them elsewhere.
    """
    if hides_parameters(kind, fsdp2=fsdp2):
        name = "FSDP version 1" if kind == "FSDP" else str(kind).removeprefix("DistributedType.")
        raise ValueError(
            f"clip_by_block cannot see the gradients of single parameters under {name}; it works on one device, under "
            "DDP and under FSDP version 2: use one of these, or max_grad_norm in its place"
        )


def hides_parameters(kind: str, *, fsdp2: bool) -> bool:
    """Whether an engine of accelerate keeps parameters and gradients where this library cannot see single ones."""
    return kind in ("DEEPSPEED", "MEGATRON_LM", "XLA") or (kind == "FSDP" and not fsdp2)


def _describe(step: int, found: Mapping[Block, Sequence[str]]) -> str:
    told = []
    for block, names in found.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        told.append(f"{block.value}: {', '.join(names[:_SHOWN]) or 'finite, but too large to square'}{more}")
    return f"the gradient of step {step + 1} was not finite. {'; '.join(told)}"
