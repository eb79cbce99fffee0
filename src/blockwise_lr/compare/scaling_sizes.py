"""Read the losses of models of several sizes from finished comparisons and runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from blockwise_lr.blocks import Block, classify
from blockwise_lr.compare.results import read_run
from blockwise_lr.errors import UserError
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig, TrainConfig, config_from_dict
from blockwise_lr.train.presets import Setting

SMALLEST_NUMBER = 4
"""Sizes that a fit needs: a power law has three numbers, and one more size shows whether it fits."""

Counted = Literal["all", "non-embedding"]
_OUTSIDE = (Block.EMB, Block.HEAD, Block.POS)


@dataclass
class Size:
    """The losses of one model size.

    Args:
        config: the configuration that the runs of this size share.
        parameters: number of parameters.
        non_embedding: number of parameters outside embeddings and output head.
        folders: where the losses were read.
        losses: {arm: {seed: terminal validation loss in nats per token}}.
        settings: {arm: base learning rate and warm-up}.
        rules: {arm: "optimizer:ratios"}.
        untuned: the arms that are known not to be tuned.
        baselines: the baselines of the comparisons.
        data: the description of the text.
    """

    config: TrainConfig
    parameters: int
    non_embedding: int
    folders: list[str] = field(default_factory=list)
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    untuned: set[str] = field(default_factory=set)
    baselines: list[str] = field(default_factory=list)
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of training tokens of a run, of each process."""
        config = self.config
        return config.steps * config.batch_size * config.accumulation * config.model.context

    def count(self, counted: Counted) -> int:
        """Return the number of parameters that the fit takes as the size."""
        return self.parameters if counted == "all" else self.non_embedding

    def add(self, folder: Path, arm: str, seed: int, loss: float) -> None:
        """Add the loss of one run.

        Raises:
            UserError: the run diverged, or there is one of this arm and seed already.
        """
        if not math.isfinite(loss):
            raise UserError(
                f"{arm} diverged with seed {seed} in {folder}: leave the arm out with --arms, or the folder"
            )
        if seed in self.losses.setdefault(arm, {}):
            raise UserError(
                f"{folder} has a second run of {arm} with seed {seed} and {self.parameters:,} parameters, after "
                f"{self.folders[0]}: give each size once, or runs of different seeds"
            )
        self.losses[arm][seed] = loss
        if str(folder) not in self.folders:
            self.folders.append(str(folder))


def read_sizes(folders: Sequence[Path], arms: Sequence[str] = ()) -> tuple[list[Size], list[str]]:
    """Read every folder; return the sizes, smallest first, and the arms, the baseline first.

    Args:
        folders: folders of finished comparisons or runs. An arm of a comparison has the comparison's name for it; that
            of a run is "optimizer:ratios".
        arms: the arms to read, the baseline first. Default: all arms that every size has; the baseline is that of the
            comparisons, or "optimizer:uniform" for runs.

    Raises:
        UserError: a folder holds neither, the sizes do not compare, an arm is missing, or there are fewer than four
            sizes.
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
    counts = [size.parameters for size in ordered]
    if len(set(counts)) < len(counts):
        twice = next(count for count in counts if counts.count(count) > 1)
        raise UserError(
            f"two different models have {twice:,} parameters; a size needs one model: leave one of them out"
        )
    if len(ordered) < SMALLEST_NUMBER:
        found = ", ".join(f"{count:,}" for count in counts) or "none"
        raise UserError(
            f"a fit over sizes needs at least {SMALLEST_NUMBER} sizes; got {len(ordered)} ({found} parameters): "
            "compare more sizes, such as with --hidden-size, and give their folders too"
        )
    _check_same(ordered)
    return ordered, _common_arms(ordered, arms)


def _add_comparison(folder: Path, sizes: dict[ModelConfig, Size], arms: Sequence[str]) -> None:
    path = folder / "compare.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        size = _size(config_from_dict(content["config"]), content["data"], sizes)
        for name, arm in content["arms"].items():
            if arm["horizon"] != "N" or (arms and name not in arms):
                continue
            for run in arm["seeds"]:
                loss = run["terminal_val_loss"]
                size.add(folder, name, run["seed"], math.inf if loss is None else float(loss))
            size.settings[name] = str(Setting(arm["base_lr"], arm["warmup_fraction"]))
            size.rules[name] = f"{arm['optimizer']}:{arm['ratios']}"
            if not content["tuned"] or name in content.get("at_edge", ()):
                size.untuned.add(name)
            if arm["role"] == "baseline":
                size.baselines.append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read {path}: {type(error).__name__}: {error}; run the compare command again to write it"
        ) from None


def _add_run(folder: Path, sizes: dict[ModelConfig, Size], arms: Sequence[str]) -> None:
    run = read_run(folder)
    config = config_from_dict(run.config["train"])
    name = f"{config.optim.optimizer}:{config.optim.ratios}"
    if arms and name not in arms:
        return
    size = _size(config, run.config.get("data"), sizes)
    size.add(folder, name, config.seed, run.val_loss)
    size.settings[name] = str(Setting(config.optim.base_lr, config.optim.warmup_fraction))
    size.rules[name] = name


def _size(config: TrainConfig, data: Any, sizes: dict[ModelConfig, Size]) -> Size:
    if config.model not in sizes:
        with torch.device("meta"):
            counts = classify(build_model(config.model, seed=0)).counts()
        total = sum(counts.values())
        outside = sum(counts.get(block, 0) for block in _OUTSIDE)
        sizes[config.model] = Size(
            config, total, total - outside, data=data if isinstance(data, dict) else {}
        )
    return sizes[config.model]


def _check_same(sizes: Sequence[Size]) -> None:
    """Check that the losses of all sizes are of the same tokens."""
    first = sizes[0]
    for size in sizes[1:]:
        for what, own, other in (
            ("text", first.data.get("content_sha256"), size.data.get("content_sha256")),
            ("tokenizer", first.data.get("tokenizer_sha256"), size.data.get("tokenizer_sha256")),
            ("vocabulary", first.config.model.vocab_size, size.config.model.vocab_size),
            ("context", first.config.model.context, size.config.model.context),
        ):
            if own != other and None not in (own, other):
                raise UserError(
                    f"{first.folders[0]} and {size.folders[0]} differ in {what} ({str(own)[:12]} and "
                    f"{str(other)[:12]}), so their losses do not compare: give sizes that share it"
                )


def _common_arms(sizes: Sequence[Size], arms: Sequence[str]) -> list[str]:
    common = [arm for arm in sizes[0].losses if all(arm in size.losses for size in sizes)]
    known = ", ".join(common) or "none"
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
