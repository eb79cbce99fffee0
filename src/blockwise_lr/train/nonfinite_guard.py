"""A gradient that is not finite, caught before the optimizer takes it: the run stops, or leaves the step out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from blockwise_lr.blocks import Block
from blockwise_lr.errors import NonFiniteLossError
from blockwise_lr.optim.gradients import Groups, ParametersByBlock, gradient_norms, parameters_with_gradients
from blockwise_lr.optim.nonfinite_report import describe_nonfinite, nonfinite_gradients, nonfinite_weights

Policy = Literal["stop", "skip"]
_TOLD = 10  # skipped steps that are told one by one; then every hundredth
_IN_A_ROW = 100  # skipped steps after which no other is expected to be better
_FEW = 4  # parameters that are told with how many of their elements are NaN or infinite


class NonFiniteGuard:
    """What happens at a gradient whose norm is NaN or infinite.

    Under DDP every process has the same mean gradient, so all of them come to the same decision without asking.

    Args:
        policy: "stop" raises; "skip" clears the gradient, so that the optimizer moves nothing, and counts. The learning
            rate's schedule and the data go on. Weights that are not finite themselves stop the run under both, since no
            step after them could be finite; and so do a hundred skipped steps in a row.
        say: prints one line.
        skipped: steps skipped before, by a run that is resumed.
    """

    def __init__(self, policy: Policy, say: Callable[[str], None], *, skipped: int = 0) -> None:
        self._policy = policy
        self._say = say
        self.skipped = skipped
        self._in_a_row = 0
        self._loss_before: Tensor | None = None

    def begin(self) -> None:
        """Forget a step that was cut short: of a training that an error or Ctrl-C ended."""
        self._in_a_row = 0
        self._loss_before = None

    def before_micro_batch(self, loss: Tensor) -> None:
        """Remember the running sum of losses as it was before this step. Nothing is remembered under "stop"."""
        if self._policy == "skip" and self._loss_before is None:
            self._loss_before = loss.clone()

    def after_step(self) -> None:
        """Of a step whose gradient was finite."""
        self._in_a_row = 0
        self._loss_before = None

    def refuse(self, model: nn.Module, groups: Groups, loss: Tensor, step: int) -> None:
        """At a gradient that is not finite: raise, or clear it and take the step's loss out of the running sum.

        Args:
            model, groups: the model and its optimizer's groups.
            loss: the running sum of losses, this step's included; changed in place.
            step: the number of this step.

        Raises:
            NonFiniteLossError: the policy is "stop", weights are not finite, or too many steps in a row were skipped.
        """
        what = "gradient" if bool(loss.isfinite()) else "loss"
        where, hopeless = culprits(model, groups)
        if self._policy == "stop" or hopeless:
            raise NonFiniteLossError(step, what, where)
        self._in_a_row += 1
        if self._in_a_row >= _IN_A_ROW:
            raise NonFiniteLossError(step, what, f"{self._in_a_row} steps in a row were not finite; {where}")
        if self._loss_before is not None:
            loss.copy_(self._loss_before)
        self._loss_before = None
        model.zero_grad(set_to_none=True)
        self.skipped += 1
        if self.skipped <= _TOLD or self.skipped % 100 == 0:
            self._say(
                f"step {step}: the {what} was not finite, its update is skipped ({self.skipped} so far); {where}"
            )


@torch.no_grad()
def culprits(model: nn.Module, groups: Groups) -> tuple[str, bool]:
    """Blocks and parameters that are not finite, in words; and whether that is the weights, and not their gradient."""
    found = parameters_with_gradients(model, groups)
    if broken := nonfinite_weights(found):
        return f"weights that are not finite: {_spell(broken, found)}", True
    spoilt = nonfinite_gradients(model, groups)
    if sum(map(len, spoilt.values())) <= _FEW:  # none: finite, but too large to square
        told = describe_nonfinite(found, gradient_norms(found), 2.0)
    else:
        told = _spell(spoilt, found)
    return f"gradients that are not finite: {told}", False


def _spell(names: Mapping[Block, Sequence[str]], found: ParametersByBlock) -> str:
    """Blocks with their parameters, two of each at most."""
    told = []
    for block, these in names.items():
        if len(these) == len(found[block]) > 1:
            told.append(f"{block.value}: all {len(these)} parameters, such as {these[0]}")
        else:
            more = f" and {len(these) - 2} more" if len(these) > 2 else ""
            told.append(f"{block.value}: {', '.join(these[:2])}{more}")
    return "; ".join(told)
