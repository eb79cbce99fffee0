"""The parameters of an Adam-mini step, viewed so that the second moments broadcast over the other tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blockwise_lr.distributed import local


@dataclass(frozen=True)
class StepInputs:
    """One parameter with everything that its step needs.

    Args:
        parameter: the parameter; it may be a DTensor.
        gradient, first, second: this process's shards of the gradient and of both moments. `second` has one element
            per piece.
        partition: number of pieces along each dimension of the whole parameter.
        betas, eps: as in Adam.
        decay: factor that weight decay applies to the parameter.
        rate: learning rate divided by the bias correction of the first moment.
        root: 1 divided by the square root of the bias correction of the second moment.
        maximize: step along the gradient, and not against it.
        whole: whether each piece lies in one process.
    """

    parameter: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    partition: tuple[int, ...]
    betas: tuple[float, float]
    decay: float
    rate: float
    root: float
    eps: float
    maximize: bool
    whole: bool


@dataclass(frozen=True)
class View:
    """Views of the tensors of one parameter, or of some of its pieces.

    Args:
        inputs: the inputs of the whole parameter.
        parameter, gradient, first: views of one shape. The gradient has its own dtype.
        second: view in which each size is that of the other tensors, or 1 for a dimension within a piece.
        within: the dimensions within a piece; none if each element is a piece.
        along: the dimension with the most pieces.
    """

    inputs: StepInputs
    parameter: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    within: tuple[int, ...]
    along: int

    @property
    def numel(self) -> int:
        return self.gradient.numel()

    def slices(self, limit: int) -> Iterator[View]:
        """Yield views of at most `limit` elements with whole pieces, or of one index if a single one is larger."""
        pieces = self.second.shape[self.along]
        length = max(1, limit * pieces // self.numel)
        if length >= pieces:
            yield self
            return
        for start in range(0, pieces, length):
            parameter, gradient, first, second = (
                tensor.narrow(self.along, start, min(length, pieces - start))
                for tensor in (self.parameter, self.gradient, self.first, self.second)
            )
            yield replace(self, parameter=parameter, gradient=gradient, first=first, second=second)


def view_of(inputs: StepInputs) -> View:
    """Return the view of a whole parameter, or of this process's shard of it."""
    parameter, gradient, first = local(inputs.parameter.detach()), inputs.gradient, inputs.first
    second, count = inputs.second, inputs.second.numel()
    within: tuple[int, ...]
    if count == parameter.numel():  # one piece per element
        shape, within = parameter.shape or torch.Size((1,)), ()
        apart = shape
    elif second.shape[0] == count and all(tensor.is_contiguous() for tensor in (parameter, gradient, first)):
        # A piece is one or several rows.
        shape, apart, within = torch.Size((count, parameter.numel() // count)), torch.Size((count, 1)), (1,)
    elif parameter.ndim == 2 and second.shape[1] == count:  # a piece is one or several columns
        rows, columns = parameter.shape
        shape, apart, within = (
            torch.Size((1, rows, count, columns // count)),
            torch.Size((1, 1, count, 1)),
            (1, 3),
        )
    else:  # split each dimension into the piece and the position within it
        pairs = list(zip(second.shape, parameter.shape))
        shape = torch.Size(size for n, whole in pairs for size in (n, whole // n))
        apart = torch.Size(size for n, _ in pairs for size in (n, 1))
        within = tuple(range(1, 2 * len(pairs), 2))
    along = max(range(len(apart)), key=apart.__getitem__)
    return View(
        inputs=inputs,
        parameter=parameter.view(shape),
        gradient=gradient.view(shape),
        first=first.view(shape),
        second=second.view(apart),
        within=within,
        along=along,
    )


def spread(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat the value of each piece over the piece.

    Args:
        value: one number per piece, with as many dimensions as the parameter.
        shape: shape of the parameter; each size is a multiple of the size in `value`.

    Example:
        >>> import torch
        >>> spread(torch.tensor([[1.0], [2.0]]), (4, 1)).flatten().tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    for dim, size in enumerate(shape):
        if value.shape[dim] != size:
            value = value.repeat_interleave(size // value.shape[dim], dim)
    return value
