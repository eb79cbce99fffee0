"""Which parameters scale or shift the output of a norm: asked of autograd, of the models with adaptive norms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SCALED = {"mul", "add", "__mul__", "__rmul__", "__add__", "__radd__", "multiply"}
_PASSED = {"to", "float", "type_as", "type", "reshape", "view", "unsqueeze", "contiguous", "flatten"}


def modulating(model: nn.Module, run: Callable[[], object]) -> set[str]:
    """The parameters that moved what a norm's output was multiplied with, or what was added to it, when `run` ran.

    Norms with a gain of their own are not adaptive, and are left out.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    watch = _Watch(parameters)
    with ExitStack() as exits:
        for module in model.modules():
            if type(module).__name__.endswith("Norm") and not list(module.parameters()):
                exits.callback(module.register_forward_hook(watch.mark).remove)
        exits.enter_context(watch)
        run()
    return watch.moved


class _Watch(TorchFunctionMode):
    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.moved: set[str] = set()
        self._parameters = parameters
        self._normed: dict[int, Tensor] = {}  # by id, kept alive

    def mark(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._normed[id(output)] = output

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        tensors = [each for each in args if isinstance(each, Tensor)]
        normed = [each for each in tensors if id(each) in self._normed]
        if normed and isinstance(out, Tensor) and name in _SCALED | _PASSED:
            self._normed[id(out)] = out
            for other in tensors:
                if id(other) not in self._normed and other.requires_grad and name in _SCALED:
                    self._record(other)
        return out

    def _record(self, scale: Tensor) -> None:
        total = (scale * torch.randn_like(scale)).sum()
        gradients = torch.autograd.grad(
            total, list(self._parameters.values()), retain_graph=True, allow_unused=True
        )
        self.moved |= {
            name for name, g in zip(self._parameters, gradients) if g is not None and bool((g != 0).any())
        }
