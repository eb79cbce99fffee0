"""classes_at: draw classes from a softmax, faster than by its distribution function in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 1 << 20  # number of logits processed at a time, so that they stay in the cache
_HALF = (torch.float16, torch.bfloat16)


def classes_at(logits: Tensor, u: Tensor) -> Tensor:
    """Return for each row the class at which the distribution function of its softmax passes u.

    The search has two steps: a group of neighbouring classes, then a class in the group. So only the sums over
    groups and the running sum within one group are in float64. The exponentials of 50 000 classes and their running
    sum would take ten times as long in float64. In float32, a running sum over all classes would shift labels at the
    tail of the distribution.

    Args:
        logits: (rows, classes), finite or -inf. A row with NaN or inf gets any class.
        u: (rows,) float64, in [0, 1).

    Returns:
        (rows,) class indices. None has probability 0.

    Example:
        >>> classes_at(torch.tensor([[0.0, 0.0, -torch.inf, 0.0]] * 3), torch.tensor([0.1, 0.5, 0.9]).double())
        tensor([0, 1, 3])
    """
    count, classes = logits.shape
    size = 8 * math.ceil(math.sqrt(classes) / 8)
    groups = math.ceil(classes / size)
    rows = max(1, min(_CHUNK // classes, count))
    kind = torch.float32 if logits.dtype in _HALF else logits.dtype
    weights = torch.zeros(rows, groups * size, dtype=kind, device=logits.device)
    drawn = []
    for start in range(0, count, rows):
        chunk = logits[start : start + rows].to(kind)
        found = weights[: len(chunk)]
        torch.sub(chunk, chunk.amax(-1, keepdim=True), out=found[:, :classes]).exp_()
        grouped = found.view(len(chunk), groups, size)
        sums = grouped.sum(-1).double()
        upto = sums.cumsum(-1)
        group, at = _passed(upto, u[start : start + rows].unsqueeze(1))
        of_group = sums.gather(1, group)
        share = (at - (upto.gather(1, group) - of_group)) / of_group
        members = grouped.gather(1, group.unsqueeze(2).expand(-1, 1, size)).squeeze(1)
        member, _ = _passed(members.double().cumsum(-1), share.clamp_(0, 1))
        drawn.append((group * size + member).squeeze(1))
    # A row with NaN never passes u, and may end in the padding of the last group.
    return torch.cat(drawn).clamp_(max=classes - 1) if drawn else logits.new_empty(0, dtype=torch.int64)


def _passed(upto: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row of running sums the first entry above a share of the total, and that share of the total.

    The entry always adds something to the sum, whatever the rounding.
    """
    whole = upto[:, -1:]
    at = torch.minimum(share * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(upto, at, right=True).clamp_(max=upto.shape[1] - 1), at
