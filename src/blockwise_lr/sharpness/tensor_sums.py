"""Sums over many tensors in float64 without a float64 copy, and without a host sync.

A GPU starts one kernel for many tensors (torch's foreach operators). A CPU has no kernels to start, so each tensor is
summed by what is fastest there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockwise_lr.fp32 import HALF

_CHUNK = 1 << 20  # elements multiplied at a time
_STACKED = 1 << 24  # elements of strided views that are copied at a time
_ONE_BY_ONE = frozenset({"cpu"})  # devices on which a foreach operator saves nothing


def sums_of_squares(tensors: Sequence[Tensor], owners: Sequence[int], totals: Tensor) -> None:
    """Add the sum of squares of each tensor to the total of its owner.

    The relative error is about 1e-14 on a GPU, and 3e-8 or less on a CPU (1e-14 for float64).

    Args:
        tensors: tensors of any dtype, on any devices, strided in any way. Some may be empty.
        owners: for each tensor, the index of its total.
        totals: (owners,) float64, changed in place.
    """
    alike: dict[tuple[torch.device, torch.dtype, torch.Size | None], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel():  # a foreach operator may leave the norm of an empty tensor undefined
            whole = tensor.device.type in _ONE_BY_ONE or _is_dense(tensor)
            alike.setdefault((tensor.device, tensor.dtype, None if whole else tensor.shape), []).append(i)
    squares: list[Tensor] = []
    order: list[int] = []
    for (device, _, shape), places in alike.items():
        order += [owners[i] for i in places]
        chosen = [tensors[i] for i in places]
        if device.type in _ONE_BY_ONE:
            squares.append(torch.stack([_squares(tensor) for tensor in chosen]))
        elif shape is None:
            squares.append(_foreach_squares(chosen))
        else:
            # One strided tensor would make the foreach operator start a kernel for each of its tensors.
            size = max(1, _STACKED // shape.numel())
            for start in range(0, len(chosen), size):
                squares.append(_foreach_squares(torch.stack(chosen[start : start + size]).unbind()))
    if squares:
        found = torch.cat([to_device(each, totals.device) for each in squares])
        totals.index_add_(0, to_device(torch.tensor(order), totals.device), found)


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Return the float64 sum of products of two tensors of one shape."""
    a, b = a.reshape(-1), b.reshape(-1)
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(a) or 1, _CHUNK)]
    products = [(a[chunk].double() * b[chunk].double()).sum() for chunk in chunks]
    return torch.stack(products).sum()


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which to add such tensors: float32 for half precision, otherwise their own."""
    return torch.float32 if tensor.dtype in HALF else tensor.dtype


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device. The host does not wait for a GPU to receive it."""
    if tensor.device == device:
        return tensor
    return tensor.to(device, non_blocking=device.type != "cpu")


def _foreach_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of each tensor. All are of one dtype, on one device, and fill their memory."""
    # CUDA's kernel converts each element to float64 as it reads it.
    norms: Sequence[Tensor] = torch._foreach_norm(list(tensors), 2, dtype=torch.float64)
    return torch.stack(list(norms)).square_()


def _squares(tensor: Tensor) -> Tensor:
    """Return the sum of squares. In large tensors, 256 neighbours are added in float32, without a float64 copy.

    The relative errors of these short sums are 1e-7 and of both signs, so the error of the total is 3e-8 or less.
    """
    flat = tensor.reshape(-1)
    whole = len(flat) // 256 * 256 if len(flat) > 1 << 16 else 0
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, 256), dim=1, dtype=accumulation_dtype(tensor))
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float64)
    total: Tensor = norms.double().square().sum() + rest.square()
    return total


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill a piece of memory, in any order and without overlap."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
