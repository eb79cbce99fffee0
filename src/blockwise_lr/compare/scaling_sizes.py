"""Read the losses of models of several sizes from finished comparisons and runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch

from blockwise_lr.blocks import Block, classify
from blockwise_lr.compare.scaling_sources import (
    ArmRuns,
    Source,
    check_shared,
    read_comparison,
    read_run_folder,
    rule_of,
    token_differences,
)
from blockwise_lr.errors import UserError
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig, TrainConfig

SMALLEST_NUMBER = 4
"""Sizes that a fit needs: a power law has three numbers, and one more size shows whether it fits."""

Counted = Literal["all", "non-embedding"]
_OUTSIDE = (Block.EMB, Block.HEAD, Block.POS)


@dataclass
class Size:
    """The losses of one model size.

    Args:
        first: the first source of this size.
        parameters: number of parameters.
        non_embedding: number of parameters outside embeddings and output head.
        folders: where the losses were read.
        losses: {arm: {seed: terminal validation loss in nats per token}}.
        settings: {arm: base learning rate and warm-up}.
        rules: {arm: "optimizer:ratios"}.
        untuned: the arms that are known not to be tuned.
        baselines: the baselines of the comparisons.
        sources: {arm: its first source}.
    """

    first: Source
    parameters: int
    non_embedding: int
    folders: list[str] = field(default_factory=list)
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    untuned: set[str] = field(default_factory=set)
    baselines: list[str] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)

    @property
    def config(self) -> TrainConfig:
        """The configuration that the runs of this size share, except for seeds and arms."""
        return self.first.config

    @property
    def tokens(self) -> int:
        """Number of training tokens of a run, of each process."""
        config = self.config
        return config.steps * config.batch_size * config.accumulation * config.model.context

    def count(self, counted: Counted) -> int:
        """Return the number of parameters that the fit takes as the size."""
        return self.parameters if counted == "all" else self.non_embedding

    def add(self, runs: ArmRuns) -> None:
        """Add the losses of an arm.

        Raises:
            UserError: a run diverged, there is one of this arm and seed already, or the runs differ from those before
                in a setting that they must share.
        """
        arm = runs.arm
        if not self.sources:
            self.first = runs.source
        for known, source in self.sources.items():
            check_shared(source, runs.source, arm if known == arm else None)
        self.sources.setdefault(arm, runs.source)
        for seed, loss in runs.losses:
            self._add_loss(runs.source.folder, arm, seed, loss)
        self.settings[arm] = runs.setting
        self.rules[arm] = rule_of(runs.source.config)
        if runs.untuned:
            self.untuned.add(arm)
        if runs.baseline:
            self.baselines.append(arm)

    def _add_loss(self, folder: Path, arm: str, seed: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"{arm} diverged with seed {seed} in {folder}: leave the arm out with --arms, or the folder"
            )
        if seed in self.losses.setdefault(arm, {}):
            raise UserError(
                f"{folder} has a second run of {arm} with seed {seed} and {self.parameters:,} parameters, after "
                f"{self.sources[arm].folder}: give each size once, or runs of different seeds"
            )
        self.losses[arm][seed] = loss
        if str(folder) not in self.folders:
            self.folders.append(str(folder))


def read_sizes(folders: Sequence[Path], arms: Sequence[str] = ()) -> tuple[list[Size], list[str]]:
    """Read every folder; return the sizes, fewest parameters first, and the arms, the baseline first.

    Args:
        folders: folders of finished comparisons or runs. An arm of a comparison has the comparison's name for it; that
            of a run is "optimizer:ratios".
        arms: the arms to read, the baseline first. Default: all arms that every size has; the baseline is that of the
            comparisons, or "optimizer:uniform" for runs.

    Raises:
        UserError: a folder holds neither, its runs or the sizes do not compare, an arm is missing, or there are fewer
            than four sizes.
    """
    sizes: dict[ModelConfig, Size] = {}
    for folder in folders:
        if (folder / "compare.json").is_file():
            _add_comparison(folder, sizes, arms)
        elif (folder / "result.json").is_file():
            _add_run(folder, sizes, arms)
        else:
            raise UserError(
                f"{folder} holds neither a finished comparison (compare.json) nor a finished run (result.json): "
                "give folders that blockwise-lr compare or train has written"
            )
    ordered = sorted(sizes.values(), key=lambda size: size.parameters)
    if len(ordered) < SMALLEST_NUMBER:
        found = ", ".join(f"{size.parameters:,}" for size in ordered) or "none"
        raise UserError(
            f"a fit over sizes needs at least {SMALLEST_NUMBER} sizes; got {len(ordered)} ({found} parameters): "
            "compare more sizes, such as with --hidden-size, and give their folders too"
        )
    _check_same(ordered)
    return ordered, _common_arms(ordered, arms)


def by_count(sizes: Sequence[Size], counted: Counted) -> list[Size]:
    """Return the sizes by the number that the fit takes as the size, smallest first.

    Raises:
        UserError: two sizes have the same number.
    """
    ordered = sorted(sizes, key=lambda size: size.count(counted))
    for one, other in pairwise(ordered):
        if one.count(counted) == other.count(counted):
            what = "parameters" + ("" if counted == "all" else " outside embeddings and output head")
            rest: Counted = "non-embedding" if counted == "all" else "all"
            way = f", or give --parameters {rest}" if one.count(rest) != other.count(rest) else ""
            raise UserError(
                f"the different models in {one.first.folder} and {other.first.folder} both have "
                f"{one.count(counted):,} {what}, and a size needs one model: leave one of them out{way}"
            )
    return ordered


def _add_comparison(folder: Path, sizes: dict[ModelConfig, Size], arms: Sequence[str]) -> None:
    base, found = read_comparison(folder, arms)
    size = _size(base, sizes)
    for runs in found:
        size.add(runs)


def _add_run(folder: Path, sizes: dict[ModelConfig, Size], arms: Sequence[str]) -> None:
    runs = read_run_folder(folder)
    if not arms or runs.arm in arms:
        _size(runs.source, sizes).add(runs)


def _size(source: Source, sizes: dict[ModelConfig, Size]) -> Size:
    """Return the size of a source's model, which is new if no source before had this model."""
    model = source.config.model
    if model not in sizes:
        try:
            with torch.device("meta"):
                counts = classify(build_model(model, seed=0)).counts()
        except UserError as error:
            raise UserError(
                f"cannot build the model of {source.folder}: {error}; leave the folder out"
            ) from None
        total = sum(counts.values())
        outside = sum(counts.get(block, 0) for block in _OUTSIDE)
        sizes[model] = Size(source, total, total - outside)
    return sizes[model]


def _check_same(sizes: Sequence[Size]) -> None:
    """Check that the losses of all sizes are of the same tokens."""
    first = sizes[0].first
    for size in sizes[1:]:
        if found := token_differences(first, size.first):
            raise UserError(
                f"{first.folder} and {size.first.folder} differ in {found[0]}, so their losses do not compare: give "
                "sizes that share it"
            )


def _common_arms(sizes: Sequence[Size], arms: Sequence[str]) -> list[str]:
    common = [arm for arm in sizes[0].losses if all(arm in size.losses for size in sizes)]
    known = ", ".join(common) or "none"
    if repeated := [arm for i, arm in enumerate(arms) if arm in arms[:i]]:
        raise UserError(f"each arm may be given once in --arms; given more than once: {', '.join(repeated)}")
    for arm in arms:
        if arm not in common:
            raise UserError(f"no arm {arm!r} at every size; the arms that all sizes have: {known}")
    if not arms:
        named = {name for size in sizes for name in size.baselines}
        first = [arm for arm in common if arm in named or arm.endswith(":uniform")]
        arms = [*first[:1], *(arm for arm in common if arm not in first[:1])]
    if len(arms) < 2:
        raise UserError(
            f"a fit over sizes compares a baseline with at least one other arm; the arms that all sizes have: {known}. "
            "Train both at every size"
        )
    for size in sizes:
        if not shared_seeds(size, arms):
            raise UserError(
                f"the arms {', '.join(arms)} have no seed in common in {size.folders[0]}: train each with the same "
                "seeds"
            )
    return list(arms)


def shared_seeds(size: Size, arms: Sequence[str]) -> list[int]:
    """Return the seeds that all arms of a size have; only these are compared."""
    return sorted(set.intersection(*(set(size.losses[arm]) for arm in arms)))
