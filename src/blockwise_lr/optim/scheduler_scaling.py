"""Let any torch schedule scale the learning rate of each block, instead of giving all blocks one rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from blockwise_lr.optim.schedules import BlockwiseSchedule
from blockwise_lr.optim.set_lr import ratio_of, restore_peak_decay, write_lr

S = TypeVar("S")

_STATE = "_by_block"
_INSIDE = "_by_block_inside"
_RATE_LISTS = (
    "max_lrs",
    "min_lrs",
    "_init_lrs",
)  # rates that a schedule keeps, one a group, besides base_lrs
_GROUP_RATES = {OneCycleLR: ("initial_lr", "max_lr", "min_lr")}  # rates that it keeps in the groups
_ROUNDING = 1e-6


def scale_by_block(scheduler: S) -> S:
    """Make a schedule work on the base learning rate, and give every block its ratio of what it computes.

        lr_b(t) = ratio_b * s(t)                 s: what the schedule gives a single group at the base learning rate

    It does not matter whether a schedule scales the learning rate that each group began with (``LambdaLR``,
    ``CosineAnnealingLR``) or overwrites all groups with one (``OneCycleLR``, ``CyclicLR``): no ratio is lost, and none
    is applied twice. Learning rates among its arguments are base learning rates (``max_lr``, ``eta_min``, ``min_lr``,
    ``swa_lr``), or lists with the rate of each group. What else it does to the groups stays, such as the momentum that
    ``OneCycleLR`` cycles.

    During a step of the schedule the groups hold their rates divided by the ratios; afterwards they are multiplied
    again, by the ratios of that moment. So schedules that compute the next rate from the current one are right, and
    ratios may move (:class:`blockwise_lr.AutoRatios`).

    Args:
        scheduler: a torch schedule on the groups of :func:`blockwise_lr.param_groups`, before its first step: any
            ``LRScheduler``, also ``SequentialLR``, ``ChainedScheduler``, ``ReduceLROnPlateau``, ``SWALR`` and those of
            transformers' ``get_scheduler``. Of nested schedules only the outermost. The schedules of this library
            have a rate for each block already.

    Returns:
        The same object, which now scales; its class is a subclass of what it was. ``get_last_lr()`` gives each group's
        rate. To resume, make and wrap the schedule as before, then ``load_state_dict``, before or after the
        optimizer's.

    Raises:
        ValueError: no schedule; one of this library; one that was wrapped inside another, or has already moved the
            groups apart. By ``load_state_dict``: the state of a schedule that was not wrapped.

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
        scale_by_block(scheduler.scheduler)  # accelerate's wrapper around the schedule
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
    # Asked before any of them is changed: OneCycleLR in a sequence has overwritten the groups of the others, too.
    overwritten = [_overwrites(leaf, groups, ratios) for leaf in leaves]
    for leaf, over in zip(leaves, overwritten):
        _divide_stored_rates(leaf, groups, ratios, over)
    if isinstance(scheduler, CyclicLR):
        # Its first rate is each group's `initial_lr`, where param_groups has set one: not a rate of its cycle.
        scheduler._get_lr_called_within_step = True
        rates = list(scheduler.get_lr())
        scheduler._get_lr_called_within_step = False
    else:
        current = [_lr_of(group) for group in groups]
        shared = _all_equal(current) and (_ratios_differ(ratios) or any(overwritten))
        rates = current if shared else [lr / ratio for lr, ratio in zip(current, ratios)]
    _refuse_moved(scheduler, leaves, groups, rates)
    cast("Any", scheduler).__class__ = _scaled_class(cast("type", type(scheduler)))
    cast("_ScaledScheduler", scheduler)._set_base_rates(rates)
    return scheduler


def is_scaled(scheduler: object) -> bool:
    """Whether this is a schedule of :func:`scale_by_block`."""
    return isinstance(scheduler, _ScaledScheduler)


class _ScaledScheduler:
    """What :func:`scale_by_block` puts before the class of a schedule."""

    optimizer: Any

    def step(self, *args: Any, **kwargs: Any) -> Any:
        with self._at_base_rates():
            return super().step(*args, **kwargs)  # type: ignore[misc]

    # A schedule around this one calls these two instead.
    def _update_lr(self, *args: Any, **kwargs: Any) -> Any:
        with self._at_base_rates():
            return super()._update_lr(*args, **kwargs)  # type: ignore[misc]

    def _initial_step(self) -> None:
        with self._at_base_rates():
            super()._initial_step()  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), _STATE: self.__dict__[_STATE]}  # type: ignore[misc]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if _STATE not in state_dict:
            raise ValueError(
                f"this state was saved by a {type(self).__mro__[2].__name__} without scale_by_block, so its rates are "
                "not base rates: load it into the schedule before it is wrapped, or start the schedule anew"
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
        """Hand the schedule the rates without ratios, then scale what it made of them."""
        if _INSIDE in self.__dict__:  # step() calls _update_lr()
            yield
            return
        known = self.__dict__[_STATE]
        for i, group in enumerate(self.optimizer.param_groups):
            ours = i < len(known["rates"]) and _same(group["lr"], known["written"][i])
            # Where another schedule or a loop has set the rate since, that is the one to go on from.
            write_lr(group, known["rates"][i] if ours else _lr_of(group) / ratio_of(group))
        self.__dict__[_INSIDE] = True
        try:
            yield
        finally:
            del self.__dict__[_INSIDE]
            self._set_base_rates([_lr_of(group) for group in self.optimizer.param_groups])

    def _set_base_rates(self, rates: Sequence[Any]) -> None:
        """Set every group to its ratio of its base rate."""
        groups = self.optimizer.param_groups
        for group, rate in zip(groups, rates):
            write_lr(group, rate * ratio_of(group))
            restore_peak_decay(group)
        written = [_lr_of(group) for group in groups]
        cycles = any(getattr(leaf, "cycle_momentum", False) for leaf in _leaves(self))
        momentum = [{k: g[k] for k in ("betas", "momentum") if k in g} for g in groups] if cycles else []
        # A new dictionary each time: a saved state must not move on with the schedule.
        self.__dict__[_STATE] = {"rates": list(rates), "written": written, "momentum": momentum}
        if hasattr(self, "_last_lr"):
            self._last_lr = list(written)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_scaled, (type(self).__mro__[2],), self.__dict__  # the class is made on the fly


@cache
def _scaled_class(base: type) -> type:
    return type(f"BlockScaled{base.__name__}", (_ScaledScheduler, base), {"__module__": __name__})


def _new_scaled(base: type) -> Any:
    scaled: Any = _scaled_class(base)
    return scaled.__new__(scaled)


def _leaves(scheduler: Any) -> Iterator[Any]:
    """The schedules inside SequentialLR and ChainedScheduler; of another schedule itself."""
    nested = getattr(scheduler, "_schedulers", None)
    if nested is None:
        yield scheduler
    else:
        for each in nested:
            yield from _leaves(each) if not isinstance(each, _ScaledScheduler) else (each,)


def _overwrites(leaf: Any, groups: Sequence[Mapping[str, Any]], ratios: Sequence[float]) -> bool:
    """Whether the schedule started from a rate of its own and not from each group's ``initial_lr``."""
    base = getattr(leaf, "base_lrs", None)
    if not base or not _all_equal(base):
        return False
    if _ratios_differ(ratios) or isinstance(leaf, (CyclicLR, OneCycleLR)):
        return True
    return not all(_same(lr, group.get("initial_lr", lr)) for lr, group in zip(base, groups))


def _divide_stored_rates(
    leaf: Any, groups: Sequence[dict[str, Any]], ratios: Sequence[float], overwritten: bool
) -> None:
    """Divide the rates that the schedule keeps by the ratios, unless they are one number for all blocks."""
    if getattr(leaf, "base_lrs", None) and not overwritten:
        leaf.base_lrs = [lr / ratio for lr, ratio in zip(leaf.base_lrs, ratios)]
    for name in _RATE_LISTS:
        values = getattr(leaf, name, None)
        if values and not (_all_equal(values) and (_ratios_differ(ratios) or name != "_init_lrs")):
            setattr(leaf, name, [lr / ratio for lr, ratio in zip(values, ratios)])
    keys = next((keys for kind, keys in _GROUP_RATES.items() if isinstance(leaf, kind)), ())
    for key in (*keys, "swa_lr"):
        values = [group.get(key) for group in groups]
        if None not in values and not _all_equal(values):
            for group, ratio in zip(groups, ratios):
                group[key] = group[key] / ratio


def _refuse_moved(
    scheduler: Any, leaves: Sequence[Any], groups: Sequence[Mapping[str, Any]], rates: Sequence[Any]
) -> None:
    """Rates that are not one share of where the groups began cannot be told apart into ratio and schedule."""
    base = getattr(leaves[0], "base_lrs", None) or ()
    shares = [(float(rate) / float(lr), group) for rate, lr, group in zip(rates, base, groups) if lr > 0]
    if not shares:
        return
    low, one = min(shares, key=lambda pair: pair[0])
    high, other = max(shares, key=lambda pair: pair[0])
    if high - low > _ROUNDING * high:
        raise ValueError(
            f"this {type(scheduler).__name__} has moved the blocks apart already ({one.get('block', 'a group')} is at "
            f"{low:.3g} of its first rate, {other.get('block', 'a group')} at {high:.3g}): wrap it when it is made, "
            "scheduler = scale_by_block(scheduler), and load_state_dict afterwards"
        )


def _lr_of(group: Mapping[str, Any]) -> Any:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        return lr.detach().clone()
    return float(lr)


def _same(one: Any, other: Any) -> bool:
    """Whether two rates are equal; of tensors on a device it is taken for granted, since looking would wait for it."""
    if any(isinstance(each, Tensor) and each.device.type != "cpu" for each in (one, other)):
        return True
    return float(one) == float(other)


def _all_equal(values: Sequence[Any]) -> bool:
    return len({float(value) for value in values}) == 1


def _ratios_differ(ratios: Sequence[float]) -> bool:
    return len(set(ratios)) > 1
