"""AutoRatios: every block's ratio, found in the run itself from what the optimizer's updates do to the loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from blockwise_lr.blocks import Block
from blockwise_lr.optim.schedules import BlockwiseSchedule
from blockwise_lr.optim.updates import unit_updates
from blockwise_lr.sharpness.processes import is_sharded, local

_LOGGER = logging.getLogger(__name__)
_SMOOTHING = 0.9  # of the guard's loss, from one to the next
Anchor = Literal["ffn", "mean"]
NAME = "auto"


@dataclass(frozen=True)
class AutoRule:
    """How :class:`AutoRatios` moves the ratios. The defaults are meant for every model: nothing here needs a search.

    Args:
        gain: by how much a block's log ratio would grow over a whole run in which its gradient and its updates agreed
            wholly, and the anchor's not at all.
        start: share of the run at which the ratios begin to move.
        stop: share of the run at which they come to rest.
        anchor: what keeps its ratio: "ffn", so that the base learning rate is FFN's (without one: the largest
            block's), or "mean", the geometric mean of all blocks.
        measurements: how many of the run's steps are measured; at most all.
        re_measure: go on after `stop`, every so many steps; 0: rest.
        low, high: bounds of a ratio.
        guard: by how much the smoothed training loss may rise above its lowest, in nats, before ratios are backed off.

    Raises:
        ValueError: a value out of range; names it.
    """

    gain: float = 300.0
    start: float = 0.0
    stop: float = 1 / 3
    anchor: Anchor = "ffn"
    measurements: int = 1000
    re_measure: int = 0
    low: float = 0.01
    high: float = 100.0
    guard: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gain) and self.gain > 0):
            raise ValueError(f"auto: gain is {self.gain}; expected a finite number above 0")
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(
                f"auto: start is {self.start:g} and stop {self.stop:g}; expected 0 <= start < stop <= 1"
            )
        if self.anchor not in get_args(Anchor):
            raise ValueError(f"auto: anchor is {self.anchor!r}; expected {' or '.join(get_args(Anchor))}")
        if self.measurements < 1:
            raise ValueError(f"auto: measurements is {self.measurements}; expected 1 or more")
        if self.re_measure < 0:
            raise ValueError(f"auto: re_measure is {self.re_measure}; expected 0 or more")
        if not self.guard > 0:
            raise ValueError(f"auto: guard is {self.guard:g}; expected a number of nats above 0")
        if not 0 < self.low < 1 < self.high:
            raise ValueError(f"auto: low is {self.low:g} and high {self.high:g}; expected 0 < low < 1 < high")


class AutoRatios:
    r"""Finds every block's learning-rate ratio in the first part of a run, at next to no cost.

    Before an optimizer step, the gradient of a batch that the optimizer has not seen meets the last update, which is
    read from the optimizer's state. Their cosine says whether more of that update would still have lowered the loss:

        cos_b = <g_b, u_b> / (|g_b| |u_b|)         u_b: the last update, as subtracted
        log r_b += gain * dt * (cos_b - cos_anchor)                            dt: share of the run since the last time

    So a block that overshoots more than the anchor slows down and one that overshoots less speeds up, until all
    agree as the anchor does; how large the steps are as a whole stays with the base learning rate, that of the anchor.

    The ratios are in the optimizer's groups (``lr_ratio`` and ``initial_lr``), where the schedule finds them and where
    ``optimizer.state_dict()`` keeps them: a resumed run goes on to the bit. Nothing else is kept.

    Args:
        optimizer: torch's Adam or AdamW on the groups of :func:`blockwise_lr.param_groups`.
        schedule: of :func:`blockwise_lr.cosine_schedule` or :func:`blockwise_lr.wsd_schedule`; its step and total are
            what shares of the run are of.
        rule: how the ratios move. Default: ``AutoRule()``.

    Raises:
        ValueError: another kind of optimizer, groups without blocks, or fewer than two blocks.

    Example:
        >>> auto = AutoRatios(optimizer, schedule)  # doctest: +SKIP
        >>> loss.backward(); optimizer.step(); schedule.step()  # as ever  # doctest: +SKIP
        >>> auto.ratios  # doctest: +SKIP
        {<Block.NORM: 'norm'>: 9.1, <Block.EMB: 'emb'>: 4.2, ...}
    """

    def __init__(
        self, optimizer: Optimizer, schedule: BlockwiseSchedule, rule: AutoRule | None = None
    ) -> None:
        if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            raise ValueError(
                f"auto reads the last update from the state of Adam or AdamW, and this is {type(optimizer).__name__}: "
                "measure ratios with AdamW and give them as numbers"
            )
        if any("block" not in group for group in optimizer.param_groups):
            raise ValueError("a parameter group has no block: make them with param_groups(model, lr)")
        self.rule = AutoRule() if rule is None else rule
        self._optimizer, self._schedule = optimizer, schedule
        if len(self._groups) < 2:
            raise ValueError(f"auto compares blocks, and the optimizer has only {', '.join(self._groups)}")
        self._anchor = _anchor(self._groups)
        self.cosines: dict[Block, float] = {}
        optimizer.register_step_pre_hook(self._before_step)

    @property
    def _groups(self) -> dict[Block, list[dict[str, Any]]]:
        """Asked for anew every time: ``load_state_dict`` makes other dictionaries."""
        groups: dict[Block, list[dict[str, Any]]] = {}
        for group in self._optimizer.param_groups:
            groups.setdefault(Block(group["block"]), []).append(group)
        return groups

    @property
    def ratios(self) -> dict[Block, float]:
        """The ratios now."""
        return {block: float(groups[0]["lr_ratio"]) for block, groups in self._groups.items()}

    def due(self, step: int) -> bool:
        """Whether the ratios move before the update that follows `step` others."""
        rule, total = self.rule, self._schedule.total_steps
        if step < max(2, rule.start * total):  # the first update has learning rate 0: nothing answers it
            return False
        every = self._every if step < rule.stop * total else rule.re_measure
        return every > 0 and step % every == 0

    @property
    def _every(self) -> int:
        return max(1, self._schedule.total_steps // self.rule.measurements)

    def watch(self, loss: float) -> bool:
        """Tell it the training loss of a step: one that rises for long brings every ratio above 1 halfway back.

        Args:
            loss: in nats; smoothed here, so that one bad batch changes nothing.

        Returns:
            Whether the ratios were backed off; the losses of then are where the guard starts anew.
        """
        memory = self._optimizer.param_groups[0]  # saved with the optimizer
        smoothed: float = loss + _SMOOTHING * (memory.get("auto_loss", loss) - loss)
        rose: bool = smoothed > memory.get("auto_lowest", smoothed) + self.rule.guard
        memory["auto_loss"] = smoothed
        memory["auto_lowest"] = smoothed if rose else min(smoothed, memory.get("auto_lowest", smoothed))
        if rose:
            # Not those below 1: a higher learning rate is no way out.
            logs = {block: math.log(ratio) for block, ratio in self.ratios.items()}
            self._set({block: log / 2 for block, log in logs.items() if log > 0})
            _LOGGER.warning(
                "step %d: the training loss has risen by more than %g: ratios backed off to %s",
                self._schedule.last_epoch,
                self.rule.guard,
                ", ".join(f"{block.value} {ratio:.3g}" for block, ratio in self.ratios.items()),
            )
        return rose

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.due(self._schedule.last_epoch):
            self.cosines = agreement(self._groups, optimizer)
            self._move()

    def _move(self) -> None:
        rule = self.rule
        gain = rule.gain * self._every / self._schedule.total_steps
        logs = {
            block: math.log(ratio) + gain * self.cosines.get(block, 0.0)
            for block, ratio in self.ratios.items()
            if block in self.cosines  # a block without gradient stays where it is
        }
        kept = self._kept(logs)
        self._set(
            {
                block: min(max(log - kept, math.log(rule.low)), math.log(rule.high))
                for block, log in logs.items()
            }
        )

    def _set(self, logs: Mapping[Block, float]) -> None:
        groups = self._groups
        for block, log in logs.items():
            for group in groups[block]:
                group["initial_lr"] *= math.exp(log) / group["lr_ratio"]
                group["lr_ratio"] = math.exp(log)

    def _kept(self, logs: Mapping[Block, float]) -> float:
        if not logs:
            return 0.0
        if self.rule.anchor == "ffn" and self._anchor in logs:
            return logs[self._anchor] - math.log(self.ratios[self._anchor])
        now = self.ratios
        return sum(log - math.log(now[block]) for block, log in logs.items()) / len(logs)


def agreement(groups: Mapping[Block, Sequence[dict[str, Any]]], optimizer: Optimizer) -> dict[Block, float]:
    """cos(g_b, u_b) of each block's gradient with its last update; blocks without one of them are left out."""
    sums = torch.stack([_sums(groups[block], optimizer) for block in groups]).cpu()
    return {
        block: dot / math.sqrt(gg * uu)
        for block, (dot, gg, uu) in zip(groups, sums.tolist())
        if gg > 0 and uu > 0 and math.isfinite(dot)
    }


def _sums(groups: Sequence[dict[str, Any]], optimizer: Optimizer) -> Tensor:
    """<g, u>, <g, g> and <u, u> over a block's groups: (3,) float64."""
    parameters = [
        p for group in groups for p in group["params"] if p.grad is not None and optimizer.state.get(p)
    ]
    total = torch.zeros(3, dtype=torch.float64, device=groups[0]["params"][0].device)
    updates = unit_updates(optimizer, parameters) or []
    shared = 1 / dist.get_world_size() if dist.is_initialized() else 1.0
    sharded = any(map(is_sharded, parameters))
    for parameter, update in zip(parameters, updates):
        gradient = local(parameter.grad).to(update.dtype)
        found = torch.stack(
            [(a * b).sum() for a, b in ((gradient, update), (gradient, gradient), (update, update))]
        )
        total += found.double() * (shared if sharded and not is_sharded(parameter) else 1.0)
    if sharded:
        dist.all_reduce(total)
    return total


def _anchor(groups: Mapping[Block, Sequence[dict[str, Any]]]) -> Block:
    if Block.FFN in groups:
        return Block.FFN
    return max(groups, key=lambda block: sum(p.numel() for group in groups[block] for p in group["params"]))


def parse_auto(text: str) -> AutoRule | None:
    """The rule that "auto" or "auto:gain=100,stop=0.5" names; None for anything else.

    Raises:
        ValueError: an option that there is not, or a value out of range.

    Example:
        >>> parse_auto("auto:stop=0.5").stop, parse_auto("paper")
        (0.5, None)
    """
    name, colon, options = text.partition(":")
    if name != NAME:
        return None
    known = {field.name: field.type for field in fields(AutoRule)}
    values: dict[str, Any] = {}
    for pair in options.split(",") if colon else []:
        key, _, value = pair.partition("=")
        if key not in known:
            raise ValueError(f"auto: no option {key!r}; there are {', '.join(known)}")
        try:
            values[key] = (
                value if known[key] == "Anchor" else int(value) if known[key] == "int" else float(value)
            )
        except ValueError:
            raise ValueError(f"auto: {key} is {value!r}; expected a number") from None
    return AutoRule(**values)
