"""AutoRatios: adapt the ratio of every block during a run, from the agreement of updates and gradients."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from blockwise_lr.blocks import Block
from blockwise_lr.directional.updates import READABLE
from blockwise_lr.experimental.agreement import agreement
from blockwise_lr.experimental.auto_rule import AutoRule
from blockwise_lr.optim.blockwise_schedule import BlockwiseSchedule
from blockwise_lr.optim.saved_settings import MOVES
from blockwise_lr.optim.set_lr import init_scale_of, ratio_of
from blockwise_lr.optimizers.state_template import unwrap_optimizer

_LOGGER = logging.getLogger(__name__)
_SMOOTHING = 0.9  # weight of the previous smoothed loss in the guard
_AVERAGING = 0.8  # weight of the previous running means of the cosine and of its square


class AutoRatios:
    r"""Adapts the learning-rate ratio of every block during the first part of a run.

    Before an optimizer step, the gradient of a new batch is compared with the last update, which is read from the
    optimizer's state. The cosine between them shows whether a larger update would have lowered the loss further. The
    consistency, between -1 and 1, shows how reliable this was over the last measurements:

        cos_b = <g_b, u_b> / (|g_b| |u_b|)                                     u_b: the last update, as subtracted
        z_b   = mean(cos_b) / sqrt(mean(cos_b^2))
        log r_b += gain * dt * (z_b - z_anchor)                       dt: fraction of the run since the last measurement

    A block that overshoots more often than the anchor slows down, and a block that overshoots less often speeds up. The
    overall size of the steps remains determined by the base learning rate, which is that of the anchor.

    A measurement is one pass over gradients and optimizer state. All results are stored in the optimizer's groups: the
    schedule reads ``lr_ratio`` and ``initial_lr`` there, and the running means are there too. They are part of
    ``optimizer.state_dict()``, so a resumed run continues exactly, to the bit.

    The object acts through a hook on the optimizer. :meth:`close`, or the end of a ``with`` block, removes the hook and
    leaves the ratios as they are. An optimizer has at most one AutoRatios; a new one closes the previous one.

    Args:
        optimizer: torch's Adam or AdamW, or AdamMini, on groups of :func:`blockwise_lr.param_groups`. It may be in a
            wrapper (accelerate, Lightning).
        schedule: from :func:`blockwise_lr.cosine_schedule` or :func:`blockwise_lr.wsd_schedule`, or accelerate's
            wrapper around it. It provides the step and the length of the run.
        rule: how the ratios change. Default: ``AutoRule()``.

    Raises:
        ValueError: the optimizer or the schedule is of another class, a group has no block, or there are fewer than
            two blocks.

    Example:
        >>> auto = AutoRatios(optimizer, schedule)  # doctest: +SKIP
        >>> loss.backward(); optimizer.step(); schedule.step()  # doctest: +SKIP
        >>> auto.ratios  # doctest: +SKIP
        {<Block.NORM: 'norm'>: 9.1, <Block.EMB: 'emb'>: 4.2, ...}
    """

    def __init__(
        self, optimizer: Optimizer, schedule: BlockwiseSchedule, rule: AutoRule | None = None
    ) -> None:
        optimizer = unwrap_optimizer(optimizer)
        schedule = getattr(schedule, "scheduler", schedule)
        if type(optimizer) not in READABLE:
            raise ValueError(
                f"auto reads the last update from the state of Adam, AdamW or AdamMini, and this is "
                f"{type(optimizer).__name__}: give it ratios that do not move, such as measured"
            )
        if any("block" not in group for group in optimizer.param_groups):
            raise ValueError("a parameter group has no block: make them with param_groups(model, lr)")
        if not isinstance(schedule, BlockwiseSchedule):
            raise ValueError(
                f"auto moves the peaks that a schedule of this library reads, and this is a {type(schedule).__name__}: "
                "make it with cosine_schedule(optimizer, ...) or wsd_schedule(optimizer, ...)"
            )
        self.rule = AutoRule() if rule is None else rule
        self._optimizer, self._schedule = optimizer, schedule
        if len(self._groups) < 2:
            raise ValueError(f"auto compares blocks, and the optimizer has only {', '.join(self._groups)}")
        self._anchor = _default_anchor(self._groups)
        self.cosines: dict[Block, float] = {}
        self._limit_logged = False  # whether the log has reported that the warm-up limits a ratio
        for group in optimizer.param_groups:
            group[MOVES] = True  # other ratios in a loaded state then do not count as a change of settings
        if (earlier := auto_of(optimizer)) is not None:
            earlier.close()
        self._hook: RemovableHandle | None = optimizer.register_step_pre_hook(self._before_step)

    def close(self) -> None:
        """Remove the hook from the optimizer; the ratios stay as they are. Further calls have no effect."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called, or a newer AutoRatios has replaced this one."""
        return self._hook is None

    def __enter__(self) -> AutoRatios:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _groups(self) -> dict[Block, list[dict[str, Any]]]:
        """The groups by block. Rebuilt on each access, because ``load_state_dict`` replaces the dictionaries."""
        groups: dict[Block, list[dict[str, Any]]] = {}
        for group in self._optimizer.param_groups:
            groups.setdefault(Block(group["block"]), []).append(group)
        return groups

    @property
    def ratios(self) -> dict[Block, float]:
        """The current ratio of each block, without the factor of ``relative_to="init"``."""
        return {
            block: ratio_of(groups[0]) / init_scale_of(groups[0]) for block, groups in self._groups.items()
        }

    def due(self, step: int) -> bool:
        """Return whether the ratios change before update number `step` + 1. False once closed."""
        if self.closed:
            return False
        # A measurement compares a gradient with the update before it, and an update at learning rate 0 changes nothing.
        first = 2 if self._schedule.begins_at_zero else 1
        if step < max(first, self.rule.start * self._schedule.total_steps):
            return False
        interval = self._interval(step)
        return interval > 0 and step % interval == 0

    def guards(self, step: int) -> bool:
        """Return whether :meth:`watch` needs the loss of update number `step` + 1. False once closed.

        The guard is active from `rule.start` to the end of the run, because ratios can also be too high after they have
        stopped changing. Reading a loss causes a host sync, so it is read only about `rule.measurements` times per run.
        """
        if self.closed:
            return False
        return step >= self.rule.start * self._schedule.total_steps and step % self._measurement_interval == 0

    @property
    def _measurement_interval(self) -> int:
        return max(1, self._schedule.total_steps // self.rule.measurements)

    def _interval(self, step: int) -> int:
        """Return the number of steps between two measurements; 0 if the ratios do not change."""
        moves = step < self.rule.stop * self._schedule.total_steps
        return self._measurement_interval if moves else self.rule.re_measure

    def watch(self, loss: float) -> bool:
        """Report the training loss of a step. If the loss has risen for a long time, every ratio above 1 is reduced.

        The logarithm of each of these ratios is halved.

        Args:
            loss: training loss in nats. It is smoothed here, so one bad batch has no effect. A non-finite loss is
                ignored, because the smoothed loss would otherwise never be finite again.

        Returns:
            Whether the ratios were reduced. The guard then restarts from the current smoothed loss.

        Raises:
            RuntimeError: the object is closed.
        """
        if self.closed:
            raise RuntimeError(
                "this AutoRatios is closed, so it no longer moves the ratios of its optimizer: make another one, "
                "AutoRatios(optimizer, schedule), or watch with the newer one that the optimizer has"
            )
        if not math.isfinite(loss):
            return False
        memory = self._optimizer.param_groups[0]  # the groups are saved with the optimizer
        smoothed: float = loss + _SMOOTHING * (memory.get("auto_loss", loss) - loss)
        rose: bool = smoothed > memory.get("auto_lowest", smoothed) + self.rule.guard
        memory["auto_loss"] = smoothed
        memory["auto_lowest"] = smoothed if rose else min(smoothed, memory.get("auto_lowest", smoothed))
        if rose:
            # Ratios below 1 stay, because a higher learning rate would not lower the loss.
            logs = {block: math.log(ratio) for block, ratio in self.ratios.items()}
            self._set_log_ratios({block: log / 2 for block, log in logs.items() if log > 0})
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
            self._adapt_ratios(self._signals())

    def _signals(self) -> dict[Block, float]:
        """Return the signal of each block from the last measurement, and update the running means."""
        if self.rule.signal == "cosine":
            return dict(self.cosines)
        signals, groups = {}, self._groups
        for block, cosine in self.cosines.items():
            memory = groups[block][0]
            mean: float = _AVERAGING * memory.get("auto_mean", 0.0) + (1 - _AVERAGING) * cosine
            square: float = _AVERAGING * memory.get("auto_square", 0.0) + (1 - _AVERAGING) * cosine**2
            memory["auto_mean"], memory["auto_square"] = mean, square
            signals[block] = mean / math.sqrt(square) if square > 0 else 0.0
        return signals

    def _adapt_ratios(self, signals: Mapping[Block, float]) -> None:
        """Change the log ratio of each block by its signal relative to the anchor, within the bounds."""
        if not signals:
            return
        rule, ratios, total = self.rule, self.ratios, self._schedule.total_steps
        gain = rule.gain * self._interval(self._schedule.last_epoch) / total
        anchored = rule.anchor == "ffn" and self._anchor in signals
        anchor = signals[self._anchor] if anchored else sum(signals.values()) / len(signals)
        # With warmup="equal_slope" a higher ratio has a longer warm-up, which has to fit into the run.
        longest = self._schedule.largest_ratio
        low, high = math.log(rule.low), math.log(min(rule.high, longest))
        # A block without gradient has no signal and keeps its ratio.
        logs = {b: math.log(ratios[b]) + gain * (signal - anchor) for b, signal in signals.items()}
        if longest < rule.high and not self._limit_logged and max(logs.values()) > high:
            self._limit_logged = True
            _LOGGER.warning(
                "step %d: no ratio goes above %.3g, since its warm-up at an equal slope would not fit the run: warm up "
                "for fewer steps or train for longer",
                self._schedule.last_epoch,
                longest,
            )
        self._set_log_ratios({block: min(max(log, low), high) for block, log in logs.items()})

    def _set_log_ratios(self, logs: Mapping[Block, float]) -> None:
        """Set ratios, peak learning rates and peak weight decays in the groups."""
        groups = self._groups
        for block, log in logs.items():
            for group in groups[block]:
                ratio = math.exp(log) * init_scale_of(group)
                factor = ratio / group["lr_ratio"]
                group["initial_lr"] *= factor
                if "peak_weight_decay" in group:
                    # With decay="constant" the shrinkage per step does not depend on the ratio.
                    group["peak_weight_decay"] /= factor
                group["lr_ratio"] = ratio


def auto_of(optimizer: Optimizer) -> AutoRatios | None:
    """Return the AutoRatios of this optimizer that is not closed, or None."""
    owners = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, AutoRatios)), None)


def _default_anchor(groups: Mapping[Block, Sequence[dict[str, Any]]]) -> Block:
    if Block.FFN in groups:
        return Block.FFN
    return max(groups, key=lambda block: sum(p.numel() for group in groups[block] for p in group["params"]))
