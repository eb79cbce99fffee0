"""Check at the first step that an optimizer holds exactly the trainable parameters of its model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers.integrations.deepspeed import deepspeed_config

from blockwise_lr.blocks.block import canonical_name

_SHOWN = 3  # number of parameters of each kind that the message names


def check_trainable(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Check that an optimizer's groups hold exactly the trainable parameters of the model.

    Args:
        model: the model, wrapped or not.
        groups: the optimizer's groups, as built by :func:`blockwise_lr.param_groups`.

    Raises:
        ValueError: the two sets differ; the message names the parameters and says what to do.

    Example:
        >>> from blockwise_lr import param_groups
        >>> model = nn.ModuleDict({"wte": nn.Embedding(16, 4), "ln_f": nn.LayerNorm(4)})
        >>> groups = param_groups(model, lr=1e-3)
        >>> model["wte"] = nn.Embedding(32, 4)
        >>> check_trainable(model, groups)
        Traceback (most recent call last):
        ...
        ValueError: the optimizer's parameters are not the trainable ones of the model. ...
    """
    in_model = dict(model.named_parameters())
    own = {id(parameter) for parameter in in_model.values()}
    names = {canonical_name(name) for name in in_model}
    held: dict[int, str] = {}
    gone: dict[str, list[str]] = {"replaced": [], "removed": [], "frozen": []}
    for group in groups:
        given = group.get("names") or [f"one of shape {tuple(p.shape)}" for p in group["params"]]
        for name, parameter in zip(given, group["params"]):
            held[id(parameter)] = name
            if id(parameter) not in own:
                gone["replaced" if canonical_name(name) in names else "removed"].append(name)
            elif not parameter.requires_grad:
                gone["frozen"].append(name)
    new = [name for name, p in in_model.items() if p.requires_grad and id(p) not in held]
    replaced = {canonical_name(name) for name in gone["replaced"]}
    new = [name for name in new if canonical_name(name) not in replaced]
    found = [
        _list_names(gone["replaced"], "Replaced by another tensor"),
        _list_names(gone["removed"], "No longer in the model"),
        _list_names(gone["frozen"], "Frozen (requires_grad=False)"),
        _list_names(new, "Trainable and not in the optimizer"),
    ]
    if any(found):
        raise ValueError(
            f"the optimizer's parameters are not the trainable ones of the model. {'; '.join(filter(None, found))}. "
            "The model changed after the optimizer was made. Freeze parameters, add adapters, and resize or tie "
            "embeddings before trainer.train(), then set trainer.optimizer = None so that train() makes a new one"
        )


def _list_names(names: Iterable[str], what: str) -> str:
    """Return "what: names" with at most `_SHOWN` names, or an empty string if there are none."""
    names = list(names)
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}"


def _hidden(model: nn.Module) -> bool:
    """Return whether a training engine gave the optimizer other tensors than the model's parameters."""
    flattened = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    on_xla = any(parameter.device.type == "xla" for parameter in model.parameters())
    return flattened or on_xla or deepspeed_config() is not None  # type: ignore[no-untyped-call]


class CheckTrainable(TrainerCallback):
    """A callback that calls :func:`check_trainable` at the first step of every ``train()``.

    Args:
        model: returns the trainer's current model.
        skip: skip the check, because the engine keeps the parameters where they cannot be compared.
    """

    def __init__(self, model: Callable[[], nn.Module], *, skip: bool) -> None:
        self._model = model
        self._skip = skip
        self._checked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._checked = self._skip

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._checked:
            check_trainable(self._model(), kwargs["optimizer"].param_groups)
            self._checked = True


class FirstStepCheck:
    """An optimizer hook that calls :func:`check_trainable` at the first step, for trainers without our callback.

    torch does not allow a hook to be removed while hooks run. After the first step the hook therefore stays on the
    optimizer, but it releases the model and has no effect.

    Args:
        optimizer: the optimizer to register the hook on.
        model: the model that the optimizer trains.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self._model: nn.Module | None = model
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._model is None:
            return
        if not _hidden(self._model):
            check_trainable(self._model, optimizer.param_groups)
        self._model = None
