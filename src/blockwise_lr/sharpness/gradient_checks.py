"""Refuse gradients that cannot be measured: sparse gradients, and gradients of complex parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from blockwise_lr.errors import UnsupportedGradientError


def check_gradient(name: str, gradient: Tensor, what: str) -> None:
    """Refuse a sparse gradient.

    Args:
        name: name of the parameter.
        gradient: its gradient.
        what: what needs a dense gradient, for the message.

    Raises:
        UnsupportedGradientError: the gradient is sparse, as ``nn.Embedding(sparse=True)`` makes it.

    Example:
        >>> check_gradient("wte.weight", torch.zeros(2).to_sparse(), "AdamMini")
        Traceback (most recent call last):
        blockwise_lr.errors.UnsupportedGradientError: AdamMini does not support sparse gradients, and wte.weight has \
one: make its embedding with sparse=False
    """
    if gradient.layout is not torch.strided:
        raise UnsupportedGradientError(
            f"{what} does not support sparse gradients, and {name} has one: make its embedding with sparse=False"
        )


def check_real(name: str, tensor: Tensor, what: str) -> None:
    """Refuse a complex parameter or gradient.

    Args:
        name: name of the parameter.
        tensor: the parameter or its gradient.
        what: what needs real numbers, for the message.

    Raises:
        UnsupportedGradientError: the tensor is complex.
    """
    if tensor.is_complex():
        raise UnsupportedGradientError(
            f"{what} does not support complex gradients, and {name} has one: keep its real and imaginary part as a "
            "real parameter (torch.view_as_real), or freeze it with requires_grad_(False)"
        )
