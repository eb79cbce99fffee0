"""Read the parameter groups that are added to an optimizer or loaded into it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from blockwise_lr.blocks.block import Structure
from blockwise_lr.optim.known_structures import known_structures
from blockwise_lr.sharpness.gradient_checks import check_gradient, check_real


def read_group(
    param_group: Mapping[str, Any] | Iterable[Tensor] | Tensor,
) -> tuple[dict[str, Any], list[Structure] | None]:
    """Return a copy of a group with its parameters as a list, and the structure of each parameter.

    Args:
        param_group: a group as torch's optimizers accept it, or parameters alone.

    Returns:
        The group, and the structures. The structures are None if the group has no block, or if one of its parameters
        did not come from ``param_groups``.

    Example:
        >>> from torch import nn
        >>> from blockwise_lr import param_groups
        >>> group, structures = read_group(param_groups(nn.Sequential(nn.LayerNorm(4)), lr=1e-3)[0])
        >>> group["names"], structures
        (['0.weight', '0.bias'], [Structure(output_dim=0, partition=(1,)), Structure(output_dim=0, partition=(4,))])
    """
    group: dict[str, Any] = dict(param_group) if isinstance(param_group, Mapping) else {"params": param_group}
    given = group["params"]
    parameters: list[Tensor] = [given] if isinstance(given, Tensor) else list(given)
    group["params"] = parameters
    return group, known_structures(parameters) if "block" in group else None


@contextmanager
def own_states_only(optimizer: Optimizer, key: str) -> Iterator[None]:
    """In this context, refuse to load the saved state of another optimizer, whose moments have other meanings.

    Args:
        optimizer: the optimizer that loads.
        key: a key that every group of this optimizer has, and no group of another one.

    Raises:
        ValueError: a saved group has no such key.
    """
    name = type(optimizer).__name__

    def check(_: Optimizer, state_dict: dict[str, Any]) -> None:
        if any(key not in group for group in state_dict.get("param_groups", ())):
            raise ValueError(
                f"this state was saved by another optimizer than {name}; expected the state_dict() of {name}: "
                "carry the moments over by parameter name, adopt_state(state, model, optimizer)"
            )

    # Hooks may replace the state. A hook that is registered last sees the state that is loaded.
    hook = optimizer.register_load_state_dict_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def name_in_group(group: Mapping[str, Any], index: int) -> str:
    """Return the name of a parameter; its shape if the group contains no names."""
    names = group.get("names")
    return str(names[index]) if names else f"a parameter {tuple(group['params'][index].shape)}"


def check_dense_and_real(group: Mapping[str, Any], index: int, tensor: Tensor, what: str) -> None:
    """Refuse a sparse or complex gradient.

    Args:
        group: the group of the parameter.
        index: position of the parameter in the group.
        tensor: the gradient.
        what: name of the optimizer, for the message.

    Raises:
        UnsupportedGradientError: the gradient is sparse or complex.
    """
    name = name_in_group(group, index)
    check_gradient(name, tensor, what)
    check_real(name, tensor, what)
