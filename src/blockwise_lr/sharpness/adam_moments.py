"""The estimator that reads Adam's second moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from blockwise_lr.distributed import local
from blockwise_lr.sharpness.draws import Draws
from blockwise_lr.sharpness.gradient_sums import SquareSums
from blockwise_lr.sharpness.parameter_parts import ParameterParts
from blockwise_lr.sharpness.tensor_sums import accumulation_dtype, to_device


def optimizer(parts: ParameterParts, adam: Optimizer, samples: int, *, keep_gradients: bool = False) -> Draws:
    r"""Read the estimate from Adam's second moment, for runs that cannot afford a backward pass.

        tr(G_b) ~ B sum_i v_i / (1 - beta2^t)

    This averages `empirical` over the last 1 / (1 - beta2) steps, with the labels of the data and after clipping.
    Clipping reduces the weight of a step equally in all blocks.

    Args:
        parts: the parts of the model's parameters.
        adam: an optimizer with ``exp_avg_sq`` and ``step`` in its state (torch's Adam, AdamW, NAdam ...), after any
            number of steps.
        samples: B, the number of samples in the mean loss of one step.
        keep_gradients: return the roots of the moments, scaled as gradients.

    Raises:
        ValueError: a parameter has no second moment or no step count of its own: the optimizer is of another kind, has
            taken no step, or is not of this model.
    """
    moments, steps = [], []
    for i, parameter in enumerate(parts.parameters):
        state = adam.state.get(parameter, {})
        moment = state.get("exp_avg_sq")
        held = moment is not None and moment.shape == parameter.shape
        # Some optimizers of other packages have no `step` here. What their moment averages differs between them.
        if not held or "step" not in state:
            missing = "step count (step)" if held else "second moment (exp_avg_sq)"
            raise ValueError(
                f"{type(adam).__name__} keeps no {missing} of the model's parameter "
                f"number {i}, {parts.names[i]}; its state has {sorted(state) or 'nothing'}: "
                "expected an Adam-like optimizer of this model that has taken a step"
            )
        moments.append(moment)
        steps.append(state["step"])
    beta2 = {id(p): group.get("betas", (0, 0))[1] for group in adam.param_groups for p in group["params"]}
    sums, kept = SquareSums(parts), []
    # Treat the root of the moment as one gradient of the summed loss, B times that of the mean loss.
    device = sums.totals.device
    decay = to_device(_stacked([beta2[id(p)] for p in parts.parameters]), device)
    scales = samples / (1 - decay ** to_device(_stacked(steps), device)).sqrt()
    for indices in parts.in_groups():
        roots = [torch.empty_like(local(moments[i]), dtype=accumulation_dtype(moments[i])) for i in indices]
        torch._foreach_copy_(roots, [local(moments[i]) for i in indices])
        torch._foreach_sqrt_(roots)
        if keep_gradients:
            torch._foreach_mul_(roots, [scales[i] for i in indices])
            kept += roots
        sums.add(indices, roots)
    totals = parts.over_shards(sums.totals)
    if not keep_gradients:
        totals = totals * scales.square().index_select(0, to_device(parts.owners(), device))
    rows = torch.tensor([[float(samples), 0.0, 0.0]], dtype=torch.float64)
    return Draws(totals.unsqueeze(0), to_device(rows, device), kept or None)


def _stacked(numbers: Sequence[Any]) -> Tensor:
    """Return numbers and tensors of shape () as one float64 vector, without a host sync."""
    tensors = [n if isinstance(n, Tensor) else torch.tensor(n, dtype=torch.float64) for n in numbers]
    device = next((n.device for n in numbers if isinstance(n, Tensor)), torch.device("cpu"))
    return torch.stack([to_device(each, device).reshape(()) for each in tensors]).double()
