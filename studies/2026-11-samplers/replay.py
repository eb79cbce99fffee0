"""Replay recorded runs under a rule that ends lost runs early: what it saves, and which good runs it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from records import BLOCKS, Run, by_setting

Array = np.ndarray[Any, np.dtype[np.float64]]

LEAST = 6
"""A set has so many runs or more."""
NOISE = 0.01
"""Losses so close count as equal, in nats."""


@dataclass(frozen=True)
class Set:
    """Runs of one setting and seed, as a search at that setting would see them.

    Args:
        name: the setting.
        steps: number of optimizer steps of a run.
        logged: steps at which the train loss was recorded, without the last one.
        train: mean train loss over the last `rows` recorded ones: a row a run, a column a logged step.
        final: tune loss at the end of each run.
        runs: the runs.
    """

    name: str
    steps: int
    logged: Array
    train: Array
    final: Array
    runs: Sequence[Run]

    @property
    def best(self) -> float:
        """The lowest tune loss."""
        return float(self.final.min())


def sets_of(runs: Iterable[Run], rows: int) -> list[Set]:
    """Return the sets of LEAST runs or more at seed 0 whose train losses were kept at the same steps.

    Args:
        runs: all recorded runs.
        rows: number of recorded train losses over which to average.
    """
    found = []
    for name, members in sorted(by_setting(runs).items()):
        kept = [run for run in members if run.train and run.seed == 0]
        grids = Counter(tuple(step for step, _ in run.train) for run in kept)
        grid = grids.most_common(1)[0][0] if grids else ()
        kept = [run for run in kept if tuple(step for step, _ in run.train) == grid]
        if len(kept) >= LEAST:
            steps, logged = kept[0].steps, np.array(grid, dtype=float)
            losses = np.array([[loss for _, loss in run.train] for run in kept])
            mean = np.apply_along_axis(lambda row: np.convolve(row, np.ones(rows) / rows, "valid"), 1, losses)
            inside = logged[rows - 1 :] < steps
            final = np.array([run.tune_loss for run in kept])
            found.append(Set(name, steps, logged[rows - 1 :][inside], mean[:, inside], final, kept))
    return found


def gaps(runs: Set, share: float) -> Array:
    """Return the largest gap at and after a share of the run: entry (i, j) is run i above run j, in nats."""
    train = runs.train[:, runs.logged >= share * runs.steps]
    return np.array([(row - train).max(axis=1) for row in train])


def needed_margin(runs: Set, share: float, within: float = np.inf) -> float:
    """Return the margin above which a rule would have ended no run that ends below the run it is compared with.

    Args:
        runs: the set. Every pair of a better and a worse run counts, in either order.
        share: share of the run before which nothing is ended.
        within: only runs that end within so many nats of the set's best count as the better one.
    """
    better = runs.final[:, None] < runs.final[None, :]
    counted = better & (runs.final <= runs.best + within)[:, None]
    return float(np.max(gaps(runs, share), where=counted, initial=0.0))


def wrong_ends(runs: Set, share: float, margin: float) -> float:
    """Return the share of the pairs of a better and a worse run in which the rule ends the better one."""
    better = runs.final[:, None] < runs.final[None, :]
    return float((gaps(runs, share) > margin)[better].mean())


KINDS = ("blockwise against uniform", "longer warm-up", "shorter warm-up", "other ratios", "another rate")
"""What the better run of a pair has that the worse one has not; :func:`kind_of` gives the first that applies."""


def kind_of(better: Run, worse: Run) -> str:
    """Return the kind of a pair, one of KINDS. Ratios that move during a run count as blockwise."""
    uniform = (1.0,) * len(BLOCKS)
    if better.warmup != worse.warmup:
        return "longer warm-up" if better.warmup > worse.warmup else "shorter warm-up"
    if better.ratios == worse.ratios:
        return "another rate"
    return "blockwise against uniform" if worse.ratios == uniform else "other ratios"


def behind(sets: Sequence[Set], kind: str, share: float, gap: float) -> tuple[int, int]:
    """Count the pairs of one kind in all sets: all, and those whose better run is more than `gap` behind at `share`."""
    pairs = found = 0
    for runs in sets:
        at = runs.train[:, int(np.argmin(np.abs(runs.logged - share * runs.steps)))]
        for i, better in enumerate(runs.runs):
            for j, worse in enumerate(runs.runs):
                if runs.final[i] < runs.final[j] and kind_of(better, worse) == kind:
                    pairs, found = pairs + 1, found + int(at[i] - at[j] > gap)
    return pairs, found


@dataclass(frozen=True)
class Outcome:
    """The mean over many random orders of the runs of a set, each order one search.

    Args:
        saved: share of the optimizer steps that was not trained.
        lost: share of the orders in which the search's best run is more than NOISE above the set's best.
        regret: nats by which the search's best run is above the set's best.
    """

    saved: float
    lost: float
    regret: float


def replay(runs: Set, share: float, margin: float, orders: int, seed: int = 0) -> Outcome:
    """Search through the set in random orders, with each run compared with the best finished run so far."""
    generator = np.random.default_rng(seed)
    allowed = runs.logged >= share * runs.steps
    over = (runs.train[:, None, allowed] - runs.train[None, :, allowed]) > margin
    ended = np.where(over.any(axis=2), runs.logged[allowed][over.argmax(axis=2)], runs.steps)
    saved, regret = np.empty(orders), np.empty(orders)
    for number in range(orders):
        order = generator.permutation(len(runs.final))
        best, trained = order[0], float(runs.steps)
        for run in order[1:]:
            trained += ended[run, best]
            if ended[run, best] == runs.steps and runs.final[run] < runs.final[best]:
                best = run
        saved[number] = 1 - trained / (runs.steps * len(order))
        regret[number] = runs.final[best] - runs.best
    return Outcome(float(saved.mean()), float((regret > NOISE).mean()), float(regret.mean()))
