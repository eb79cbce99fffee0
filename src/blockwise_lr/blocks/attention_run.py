"""Run a copy of one attention alone on random numbers, to see what the rows of its fused weights affect."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from blockwise_lr.blocks.autograd_layouts import NotSeenError, Rows, UnresolvedWeight, rows_of_run
from blockwise_lr.blocks.topology import output_dim

_LENGTH = 6  # tokens of the random input
_LONGEST = 1024  # the longest random input, for attentions built for one length
_RANDOM = 100_003  # random numbers before they repeat; a prime, so that no two rows are equal
# Names of required arguments that get the random hidden states.
_HIDDEN = (
    "x",
    "hidden_states",
    "hidden",
    "input",
    "inputs",
    "query",
    "key",
    "value",
    "q",
    "k",
    "v",
    "context",
)


def rows_of_attention(attention: nn.Module, fused: Mapping[str, str], width: int) -> dict[str, Rows]:
    """Return what the rows of fused weights affect while a copy of their attention runs alone on random numbers.

    Args:
        attention: the module. It is not changed, and may be on the meta device.
        fused: name -> path of the linear layer in the attention.
        width: width of the inputs.

    Raises:
        NotSeenError: the attention cannot be copied or run, or its computation was not seen.
    """
    # The caller may be building a model on the meta device, so the device is set explicitly.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        try:
            twin = _random_copy(attention)
            inputs = [_inputs(twin, width, length) for length in (_LENGTH, *_lengths(twin))]
        except NotSeenError:
            raise
        except Exception as error:
            raise NotSeenError(f"it cannot be copied: {type(error).__name__}: {error}") from error
        layers = {name: twin.get_submodule(path) for name, path in fused.items()}
        weights = {
            name: UnresolvedWeight(cast("nn.Parameter", layer.weight), output_dim(layer))
            for name, layer in layers.items()
        }
        failure: NotSeenError | None = None
        for given in inputs:
            try:
                return rows_of_run(twin, {"": weights}, functools.partial(twin, **given))
            except NotSeenError as why:
                failure = failure or why
        raise failure or NotSeenError("no attention was seen in it")


def _random_copy(attention: nn.Module) -> nn.Module:
    """Return a copy in single precision with random weights. A weight at zero would hide what it multiplies."""
    twin = copy.deepcopy(attention)
    without_values = [name for name, buffer in twin.named_buffers() if buffer.is_meta]
    twin = (
        twin.to_empty(device="cpu")
        if without_values or any(p.is_meta for p in twin.parameters())
        else twin.cpu()
    )
    twin = twin.float().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        few = 0.3 * torch.randn(_RANDOM, generator=generator)
        for parameter in twin.parameters():
            rows = -(-parameter.numel() // _RANDOM)
            parameter.copy_(few.repeat(rows)[: parameter.numel()].view_as(parameter))
        for name, buffer in twin.named_buffers():
            if name in without_values:
                buffer.fill_(1)  # as a mask, ones hide nothing
    return twin


def _lengths(attention: nn.Module) -> list[int]:
    """Return sequence lengths that an attention may be built for: the sizes of its masks and position biases."""
    tensors = [*attention.named_parameters(), *attention.named_buffers()]
    shapes = [t.shape for name, t in tensors if name.rpartition(".")[2] not in ("weight", "bias")]
    sizes = {size for shape in shapes if len(shape) > 1 for size in shape[-2:]}
    return sorted(size for size in sizes - {_LENGTH} if 1 < size <= _LONGEST)


def _inputs(attention: nn.Module, width: int, length: int) -> dict[str, Any]:
    """Return arguments for the forward of an attention: hidden states, and None for required masks."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, length, width, generator=generator)
    inputs: dict[str, Any] = {}
    for index, (name, parameter) in enumerate(inspect.signature(attention.forward).parameters.items()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if index == 0 or (parameter.default is parameter.empty and name in _HIDDEN):
            inputs[name] = hidden
        elif parameter.default is parameter.empty and "mask" in name:
            inputs[name] = None
        elif parameter.default is parameter.empty:
            raise NotSeenError(f"alone it cannot be run, because its forward needs {name!r}")
    return inputs
