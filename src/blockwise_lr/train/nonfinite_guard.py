"""Keep NaN and infinite gradients from the optimizer: stop the run, or skip the step."""

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
_REPORTED_SINGLY = 10  # the first skipped steps, which are reported singly; after them, every hundredth is
_IN_A_ROW = 100  # skipped steps in a row after which the run stops, since the next ones would not be better
_FEW = 4  # at most this many parameters are reported with counts of NaN and infinite elements


class NonFiniteGuard:
    """Stops the run, or skips the step, when the norm of the gradient is NaN or infinite.

    Under DDP, all ranks have the same mean gradient, so they reach the same decision without communication.

    Args:
        policy: "stop" raises an error. "skip" clears the gradient, so that the optimizer changes nothing, and counts
            the step; the schedule and the data advance. Both policies stop the run when weights are not finite, because
            no later step could be finite. Both also stop it after a hundred skipped steps in a row.
        notify: prints one line.
        skipped: number of steps that a resumed run has skipped before.
    """

    def __init__(self, policy: Policy, notify: Callable[[str], None], *, skipped: int = 0) -> None:
        self._policy = policy
        self._notify = notify
        self.skipped = skipped
        self._in_a_row = 0
        self._loss_before: Tensor | None = None

    def begin(self) -> None:
        """Discard the state of a step that an error or Ctrl-C interrupted."""
        self._in_a_row = 0
        self._loss_before = None

    def before_micro_batch(self, loss: Tensor) -> None:
        """Save the running sum of losses from before this step. The policy "stop" does not need it."""
        if self._policy == "skip" and self._loss_before is None:
            self._loss_before = loss.clone()

    def after_step(self) -> None:
        """Call this after a step with finite gradients."""
        self._in_a_row = 0
        self._loss_before = None

    def stop_or_skip(self, model: nn.Module, groups: Groups, loss: Tensor, step: int) -> None:
        """Handle a gradient that is not finite: raise, or clear it and remove the step's loss from the running sum.

        Args:
            model: the model that trains.
            groups: the optimizer's parameter groups.
            loss: the running sum of losses, including this step's; changed in place.
            step: the number of this step.

        Raises:
            NonFiniteLossError: the policy is "stop", weights are not finite, or too many steps in a row were skipped.
        """
        what: Literal["gradient", "loss"] = "gradient" if bool(loss.isfinite()) else "loss"
        where, hopeless = find_nonfinite(model, groups)
        self.count(what, step, where, hopeless=hopeless)
        if self._loss_before is not None:
            loss.copy_(self._loss_before)
        self._loss_before = None
        model.zero_grad(set_to_none=True)

    def count(self, what: Literal["gradient", "loss"], step: int, where: str, *, hopeless: bool) -> None:
        """Stop the run, or count and report a step whose update is skipped.

        Args:
            what: the value that was not finite.
            step: the number of the step.
            where: describes the blocks and parameters.
            hopeless: whether weights are not finite, so that no later step can succeed.

        Raises:
            NonFiniteLossError: as in :meth:`stop_or_skip`.
        """
        if self._policy == "stop" or hopeless:
            raise NonFiniteLossError(step, what, where)
        self._in_a_row += 1
        if self._in_a_row >= _IN_A_ROW:
            raise NonFiniteLossError(step, what, f"{self._in_a_row} steps in a row were not finite; {where}")
        self.skipped += 1
        if self.skipped <= _REPORTED_SINGLY or self.skipped % 100 == 0:
            self._notify(
                f"step {step}: the {what} was not finite, its update is skipped ({self.skipped} so far); {where}"
            )


@torch.no_grad()
def find_nonfinite(model: nn.Module, groups: Groups) -> tuple[str, bool]:
    """Find the blocks and parameters with NaN or infinite elements.

    Returns:
        A description of them, and whether the weights are affected; otherwise only their gradients are.
    """
    found = parameters_with_gradients(model, groups)
    if broken := nonfinite_weights(found):
        return f"weights that are not finite: {list_parameters(broken, found)}", True
    nonfinite = nonfinite_gradients(model, groups)
    # An empty sum: the gradients are finite, but their squares overflow.
    if sum(map(len, nonfinite.values())) <= _FEW:
        description = describe_nonfinite(found, gradient_norms(found), 2.0)
    else:
        description = list_parameters(nonfinite, found)
    return f"gradients that are not finite: {description}", False


def list_parameters(names: Mapping[Block, Sequence[str]], found: ParametersByBlock) -> str:
    """List each block with at most two of its parameters."""
    texts = []
    for block, these in names.items():
        if len(these) == len(found[block]) > 1:
            texts.append(f"{block.value}: all {len(these)} parameters, such as {these[0]}")
        else:
            more = f" and {len(these) - 2} more" if len(these) > 2 else ""
            texts.append(f"{block.value}: {', '.join(these[:2])}{more}")
    return "; ".join(texts)
