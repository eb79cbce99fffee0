"""Apply the learning-rate ratios to any torch scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar, cast

from torch.optim.lr_scheduler import CyclicLR

from blockwise_lr.optim.blockwise_schedule import BlockwiseSchedule
from blockwise_lr.optim.set_lr import ratio_of, restore_peak_decay, write_lr
from blockwise_lr.optim.stored_rates import (
    all_equal,
    divide_stored_rates,
    lr_of,
    overwrites,
    ratios_differ,
    refuse_moved,
    same_lr,
)

S = TypeVar("S")

_STATE = "_by_block"
_INSIDE = "_by_block_inside"


def scale_by_block(scheduler: S) -> S:
    """Make a scheduler compute the base learning rate, and give each block its ratio of that rate.

        lr_b(t) = ratio_b * s(t)                 s: the scheduler's rate for one group at the base learning rate

    This works both for schedulers that scale the initial learning rate of each group (``LambdaLR``,
    ``CosineAnnealingLR``) and for those that overwrite all groups with one rate (``OneCycleLR``, ``CyclicLR``). No
    ratio is lost, and none is applied twice. Learning rates in the scheduler's arguments (``max_lr``, ``eta_min``,
    ``min_lr``, ``swa_lr``) are base learning rates, or lists with the learning rate of each group. Other changes that
    the scheduler makes to the groups are kept, such as the momentum that ``OneCycleLR`` cycles.

    During a step of the scheduler, the groups hold their learning rates divided by the ratios. After the step, the
    learning rates are multiplied by the current ratios. Schedulers that compute the next rate from the current one
    therefore work, and the ratios may change during the run (:class:`blockwise_lr.AutoRatios`).

    Args:
        scheduler: a torch scheduler on the groups of :func:`blockwise_lr.param_groups`, before its first step. Any
            ``LRScheduler`` works, including ``SequentialLR``, ``ChainedScheduler``, ``ReduceLROnPlateau``, ``SWALR``
            and those of transformers' ``get_scheduler``. Of nested schedulers, pass only the outermost. The schedules
            of this library already have a learning rate for each block, so they are refused.

    Returns:
        The same object, whose class is now a subclass of its previous class. ``get_last_lr()`` returns the learning
        rate of each group. To resume, create and wrap the scheduler in the same way, then call ``load_state_dict``,
        before or after that of the optimizer.

    Raises:
        ValueError: `scheduler` is not a scheduler, is one of this library's, contains one that is already wrapped, or
            has already changed the ratios between the groups. The ``load_state_dict`` of the result raises ValueError
            for the state of a scheduler that was not wrapped.

    Example:
        >>> import torch
        >>> from blockwise_lr import param_groups
        >>> model = torch.nn.ModuleDict({"wte": torch.nn.Embedding(16, 4), "ln_f": torch.nn.LayerNorm(4)})
        >>> optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, ratios={"emb": 10}), lr=1e-3)
        >>> scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=100, div_factor=10)
        >>> [round(lr, 6) for lr in scheduler.get_last_lr()]  # one rate for both blocks
        [0.0001, 0.0001]
        >>> scheduler = scale_by_block(scheduler)
        >>> [round(lr, 6) for lr in scheduler.get_last_lr()]
        [0.0001, 0.001]
    """
    if isinstance(scheduler, _ScaledScheduler):
        return scheduler
    if not hasattr(scheduler, "optimizer") and hasattr(scheduler, "scheduler"):
        scale_by_block(scheduler.scheduler)  # accelerate's wrapper around the scheduler
        return scheduler
    if isinstance(scheduler, BlockwiseSchedule):
        raise ValueError(
            f"{type(scheduler).__name__} gives each block its own learning rate already: use it without scale_by_block"
        )
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", None)
    if groups is None or not hasattr(scheduler, "step"):
        raise ValueError(
            f"scale_by_block got a {type(scheduler).__name__}; expected a torch schedule, such as "
            "scale_by_block(OneCycleLR(optimizer, max_lr=1e-3, total_steps=1000))"
        )
    leaves = list(_leaves(scheduler))
    if any(isinstance(leaf, (_ScaledScheduler, BlockwiseSchedule)) for leaf in leaves):
        raise ValueError(
            f"a schedule inside this {type(scheduler).__name__} gives each block its own learning rate already: make "
            "it of plain torch schedules and wrap only the outermost, scale_by_block(SequentialLR(...))"
        )
    ratios = [ratio_of(group) for group in groups]
    # All leaves are checked before any is changed: OneCycleLR in a sequence also overwrites the groups of the others.
    overwritten = [overwrites(leaf, groups, ratios) for leaf in leaves]
    for leaf, over in zip(leaves, overwritten):
        divide_stored_rates(leaf, groups, ratios, over)
    if isinstance(scheduler, CyclicLR):
        # The groups hold `initial_lr` from param_groups, which is not a rate of the cycle. Compute the first rate here.
        scheduler._get_lr_called_within_step = True
        rates = list(scheduler.get_lr())
        scheduler._get_lr_called_within_step = False
    else:
        current = [lr_of(group) for group in groups]
        shared = all_equal(current) and (ratios_differ(ratios) or any(overwritten))
        rates = current if shared else [lr / ratio for lr, ratio in zip(current, ratios)]
    refuse_moved(scheduler, leaves, groups, rates)
    cast("Any", scheduler).__class__ = _scaled_class(cast("type", type(scheduler)))
    cast("_ScaledScheduler", scheduler)._set_base_rates(rates)
    return scheduler


def is_scaled(scheduler: object) -> bool:
    """Return whether `scheduler` was wrapped by :func:`scale_by_block`."""
    return isinstance(scheduler, _ScaledScheduler)


class _ScaledScheduler:
    """The base class that :func:`scale_by_block` puts in front of the class of a scheduler."""

    optimizer: Any

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Do a step of the scheduler at base rates."""
        with self._at_base_rates():
            return super().step(*args, **kwargs)  # type: ignore[misc]

    # An enclosing scheduler calls the next two methods instead of step().
    def _update_lr(self, *args: Any, **kwargs: Any) -> Any:
        with self._at_base_rates():
            return super()._update_lr(*args, **kwargs)  # type: ignore[misc]

    def _initial_step(self) -> None:
        with self._at_base_rates():
            super()._initial_step()  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the scheduler with its base rates."""
        return {**super().state_dict(), _STATE: self.__dict__[_STATE]}  # type: ignore[misc]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of :meth:`state_dict` and set the learning rates of the groups.

        Raises:
            ValueError: the scheduler that saved the state was not wrapped.
        """
        if _STATE not in state_dict:
            raise ValueError(
                f"this state was saved by a {type(self).__mro__[2].__name__} without scale_by_block, so its rates are "
                "not base rates: load it into the schedule before it is wrapped, or restart the schedule"
            )
        state = dict(state_dict)
        own = state.pop(_STATE)
        super().load_state_dict(state)  # type: ignore[misc]
        groups = self.optimizer.param_groups
        for group, momentum in zip(groups, own["momentum"]):
            group.update({key: tuple(m) if isinstance(m, list) else m for key, m in momentum.items()})
        self._set_base_rates(own["rates"])

    @contextmanager
    def _at_base_rates(self) -> Iterator[None]:
        """Run the scheduler on learning rates without ratios, then multiply its results by the ratios."""
        if _INSIDE in self.__dict__:  # step() calls _update_lr()
            yield
            return
        known = self.__dict__[_STATE]
        for i, group in enumerate(self.optimizer.param_groups):
            ours = i < len(known["rates"]) and same_lr(group["lr"], known["written"][i])
            # If other code has set the rate since the last step, continue from that rate.
            write_lr(group, known["rates"][i] if ours else lr_of(group) / ratio_of(group))
        self.__dict__[_INSIDE] = True
        try:
            yield
        finally:
            del self.__dict__[_INSIDE]
            self._set_base_rates([lr_of(group) for group in self.optimizer.param_groups])

    def _set_base_rates(self, rates: Sequence[Any]) -> None:
        """Set the learning rate of every group to its base rate times its ratio."""
        groups = self.optimizer.param_groups
        for group, rate in zip(groups, rates):
            write_lr(group, rate * ratio_of(group))
            restore_peak_decay(group)
        written = [lr_of(group) for group in groups]
        cycles = any(getattr(leaf, "cycle_momentum", False) for leaf in _leaves(self))
        momentum = [{k: g[k] for k in ("betas", "momentum") if k in g} for g in groups] if cycles else []
        # A new dictionary each time, because a saved state must not change with the scheduler.
        self.__dict__[_STATE] = {"rates": list(rates), "written": written, "momentum": momentum}
        if hasattr(self, "_last_lr"):
            self._last_lr = list(written)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle cannot find a class that is created at run time, so it stores the original class.
        return _new_scaled, (type(self).__mro__[2],), self.__dict__


@cache
def _scaled_class(base: type) -> type:
    return type(f"BlockScaled{base.__name__}", (_ScaledScheduler, base), {"__module__": __name__})


def _new_scaled(base: type) -> Any:
    scaled: Any = _scaled_class(base)
    return scaled.__new__(scaled)


def _leaves(scheduler: Any) -> Iterator[Any]:
    """Yield the schedulers inside SequentialLR and ChainedScheduler; for other schedulers, the scheduler itself."""
    nested = getattr(scheduler, "_schedulers", None)
    if nested is None:
        yield scheduler
    else:
        for each in nested:
            yield from _leaves(each) if not isinstance(each, _ScaledScheduler) else (each,)
