"""Skip non-finite gradients on the device, and report them when the run logs, so that no step waits for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockwise_lr.blocks import Block
from blockwise_lr.optim.gradients import Groups, ParametersByBlock
from blockwise_lr.optim.nonfinite_report import nonfinite_weights
from blockwise_lr.train.nonfinite_guard import NonFiniteGuard, Policy, list_parameters

_UNREAD = 64  # steps whose norms are kept until they are read, for runs that log rarely
_WHOLE_PARAMETERS = ("NO", "MULTI_GPU", "MULTI_CPU")  # accelerate's distributed types


def can_defer(optimizer: Optimizer, device: torch.device, distributed: str) -> bool:
    """Return whether an optimizer can skip a step on the device, without the host knowing.

    torch's fused optimizers can: they read ``found_inf``, which torch's gradient scaler sets too. On a CPU there is
    nothing to wait for. Sharded parameters are left out.

    Args:
        optimizer: the optimizer, without accelerate's wrapper.
        device: the device that trains.
        distributed: accelerate's ``DistributedType``.
    """
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return device.type == "cuda" and fused and distributed in _WHOLE_PARAMETERS


@dataclass(frozen=True)
class _Step:
    number: int
    values: Tensor  # the running sum of losses, the norm of the whole gradient, the norm of each parameter's gradient
    parameters: Sequence[nn.Parameter]


class DeferredGuard(NonFiniteGuard):
    """A :class:`NonFiniteGuard` that can also leave the check of a step to the device.

    After :meth:`defer` the optimizer changes nothing in a step whose gradient is not finite. With the policy "stop" it
    also changes nothing in later steps. :meth:`read` then does what the guard does at the step itself.
    """

    def __init__(self, policy: Policy, notify: Callable[[str], None], *, skipped: int = 0) -> None:
        super().__init__(policy, notify, skipped=skipped)
        self._unread: list[_Step] = []
        self._stopped: Tensor | None = None

    def begin(self) -> None:
        super().begin()
        self._unread = []
        self._stopped = None

    def defer(
        self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], loss: Tensor, step: int
    ) -> Tensor:
        """Let the device decide about this step.

        Args:
            optimizer: a fused optimizer of torch, see :func:`can_defer`.
            parameters: the parameters that have a gradient, all on one device and of one dtype.
            loss: the running sum of losses, including this step's; with the policy "skip" changed in place.
            step: the number of this step.

        Returns:
            The norm of the whole gradient.
        """
        norms = torch.stack(torch._foreach_norm([cast("Tensor", p.grad) for p in parameters]))
        total: Tensor = torch.linalg.vector_norm(norms)
        values = torch.cat([loss.reshape(1), total.reshape(1), norms])
        self._unread.append(_Step(step, values, parameters))
        skip = ~total.isfinite()
        if self._loss_before is not None:
            loss.copy_(torch.where(skip, self._loss_before, loss))
            self._loss_before = None
        if self._policy == "stop":
            self._stopped = skip = skip if self._stopped is None else skip | self._stopped
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        return total

    @property
    def is_full(self) -> bool:
        """Whether :meth:`read` should be called before the run logs."""
        return len(self._unread) >= _UNREAD

    def read(self, groups: Groups) -> int:
        """Handle the steps since the last call. Causes one host sync, and a second one if a gradient was not finite.

        Args:
            groups: the optimizer's parameter groups.

        Returns:
            The number of steps that were skipped.

        Raises:
            NonFiniteLossError: as :meth:`NonFiniteGuard.stop_or_skip`.
        """
        steps, self._unread = self._unread, []
        if not steps:
            return 0
        values = iter(torch.cat([step.values for step in steps]).tolist())
        skipped = 0
        for step in steps:
            loss, total = next(values), next(values)
            norms = [next(values) for _ in step.parameters]
            if math.isfinite(total):
                self.after_step()
                continue
            where, hopeless = _describe(step.parameters, norms, groups)
            what: Literal["gradient", "loss"] = "gradient" if math.isfinite(loss) else "loss"
            self.count(what, step.number, where, hopeless=hopeless)
            skipped += 1
        return skipped


def _describe(parameters: Sequence[nn.Parameter], norms: Sequence[float], groups: Groups) -> tuple[str, bool]:
    """Describe the gradients that were not finite by their norms, because the gradients themselves are gone.

    Returns:
        The description, and whether weights are not finite either. The step has changed no weight.
    """
    known: ParametersByBlock = {Block(g["block"]): dict(zip(g["names"], g["params"])) for g in groups}
    if broken := nonfinite_weights(known):
        return f"weights that are not finite: {list_parameters(broken, known)}", True
    places = {id(p): (block, name) for block, of in known.items() for name, p in of.items()}
    found: dict[Block, list[str]] = {}
    for parameter, norm in zip(parameters, norms):
        if not math.isfinite(norm):
            block, name = places[id(parameter)]
            found.setdefault(block, []).append(name)
    if not found:
        return "gradients that are finite, but too large for the norm of all of them", False
    return f"gradients that are not finite: {list_parameters(found, known)}", False
