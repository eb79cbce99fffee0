"""Check the types of arguments, with messages that show what to write instead."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


def check_model(model: Any, function: str) -> None:
    """Check that a model is a module.

    Args:
        model: the argument that the user passed as the model.
        function: name of the function that the user called.

    Raises:
        TypeError: `model` is no ``nn.Module``; the message says what it is and what to pass.

    Example:
        >>> check_model(nn.Linear(2, 2), "param_groups")
        >>> try:
        ...     check_model(nn.Linear(2, 2).parameters(), "param_groups")
        ... except TypeError as error:
        ...     print(str(error).partition(": ")[0])
        param_groups got parameters; expected the model itself (a torch.nn.Module)
    """
    if isinstance(model, nn.Module):
        return
    what, remedy = _not_a_model(model, function)
    raise TypeError(f"{function} got {what}; expected the model itself (a torch.nn.Module): {remedy}")


def _not_a_model(given: Any, function: str) -> tuple[str, str]:
    call = f"{function}(model, ...)"
    if given is None:
        return "None", f"call {call} with the model that you train"
    if isinstance(given, type) and issubclass(given, nn.Module):
        return f"the class {given.__name__}", f"make a model of it first, model = {given.__name__}(...)"
    if isinstance(given, torch.optim.Optimizer):
        return (
            f"an optimizer ({type(given).__name__})",
            f"call {call}, and make the optimizer from the groups: AdamW(param_groups(model, lr=...), lr=...)",
        )
    if isinstance(getattr(given, "model", None), nn.Module):  # such as a Trainer or a pipeline
        return f"a {type(given).__name__}", f"pass its model, {call.replace('model', 'x.model')}"
    if isinstance(given, Mapping):
        if given and all(isinstance(value, torch.Tensor) for value in given.values()):
            return "a state_dict", f"load it with model.load_state_dict(...), then call {call}"
        return f"a {type(given).__name__}", f"call {call}"
    if isinstance(given, numbers.Real):
        return f"the number {given}", f"the model comes first, {call}"
    if isinstance(given, str):
        return f"the text {given!r}", f"load the model first, such as with from_pretrained, then call {call}"
    if isinstance(given, torch.Tensor):
        return "a tensor", f"call {call}: blocks are found by where a parameter is used"
    if isinstance(given, Iterable):
        first = next(iter(given), None)
        if isinstance(first, Mapping):
            return "parameter groups", f"call {call}, which makes the groups"
        return "parameters", f"call {call}: a parameter does not know in which block it is"
    return f"a {type(given).__name__}", f"call {call}"


def check_number(value: Any, name: str, example: str) -> float:
    """Return a number as a float. The caller checks its range.

    Args:
        value: the argument that the user passed; any real number is accepted, including numpy's.
        name: the argument's name.
        example: a value for the message, such as "1e-3".

    Raises:
        TypeError: `value` is no number, for example text, None or a tensor; the message says what to write.

    Example:
        >>> check_number(1, "lr", "1e-3")
        1.0
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            remedy = f"{name}={example}"
        else:
            remedy = f"without quotes, {name}={value.strip()}"
        what = f"the text {value!r}"
    elif isinstance(value, torch.Tensor):
        what, remedy = (
            f"a tensor of shape {tuple(value.shape)}",
            f"{name}=tensor.item() for one of one element",
        )
    elif isinstance(value, Mapping):
        what, remedy = (
            f"a {type(value).__name__}",
            f"one number, {name}={example}; ratios= scales it by block",
        )
    else:
        what, remedy = f"{value!r:.60}", f"{name}={example}"
    raise TypeError(f"{name} is {what}; expected a number: {remedy}")


def check_options(options: Mapping[str, Any], function: str) -> None:
    """Check that an optimizer's options have no numbers in quotes, and that betas are a tuple.

    Args:
        options: keyword arguments for the optimizer.
        function: name of the function that the user called.

    Raises:
        TypeError: an option is a number in quotes, or betas are no numbers in a tuple; the message says what to write.

    Example:
        >>> check_options({"betas": (0.9, 0.95), "fused": True}, "build_optimizer")
    """
    for name, value in options.items():
        if name == "betas" and not (isinstance(value, (tuple, list)) and value):
            raise TypeError(
                f"{function}: betas is {value!r:.60}; expected numbers in a tuple: betas=(0.9, 0.95)"
            )
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if not isinstance(each, str) or (name != "betas" and not is_number(each)):
                continue
            plain = tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else _plain(value)
            raise TypeError(
                f"{function}: {name} is {value!r:.60}, with the text {each!r}; expected numbers: {name}={plain}"
                if is_number(each)
                else f"{function}: {name} is {value!r:.60}; expected numbers: {name}=(0.9, 0.95)"
            )


def is_number(text: str) -> bool:
    """Return whether a text can be converted to a float.

    Example:
        >>> is_number("1e-3"), is_number("coupled")
        (True, False)
    """
    try:
        float(text)
    except ValueError:
        return False
    return True


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, str) and is_number(value) else value
