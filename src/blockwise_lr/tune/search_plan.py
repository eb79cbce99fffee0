"""The plan of a search: its proxy, its phases, its start points, and the training run of each trial."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from blockwise_lr.blocks import Block, classify, split_fused
from blockwise_lr.errors import UserError
from blockwise_lr.optim.ratios import DEFAULT_RATIOS, MEASURED_RATIOS, spell_ratios
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig, TrainConfig, config_from_dict, identity
from blockwise_lr.train.ranges import LARGEST_SEED
from blockwise_lr.tune.early_end import DEFAULT_RULE, EarlyEnd
from blockwise_lr.tune.proxy import describe_size, proxy_model
from blockwise_lr.tune.samplers import AUTO
from blockwise_lr.tune.space import Point, Space

LEAST_TRIALS = 5
_WARMUP = 0.15  # where the search begins; the preset's own may belong to a far longer run
_RATE_RANGE = 5.0  # log2 units to either side of the first base learning rate
_UNUSED = {
    "eval_every",
    "init_seed",
    "data_seed",
    "optim.warmup_fraction",
    "optim.warmup_steps",
    "optim.re_measure",
}
_RULES = ("measured", "auto")  # ratios whose base learning rate is about a quarter of a uniform one


@dataclass(frozen=True)
class SearchPlan:
    """The settings of a search, and what follows from them.

    Args:
        base: the configuration of the user's run: model, text, optimizer and number of steps of a trial.
        trials: number of trials of the search, the uniform ones included.
        sampler: name of the sampler of the ratios; "auto": the trust-region search.
        proxy: size of the proxy, in the form of `--proxy`.
        repeats: number of seeds with which the best point and the best uniform point are trained at the end.
        early_end: the rule that ends lost runs; None: every run goes to its end.

    Raises:
        UserError: a setting is out of range.
    """

    base: TrainConfig
    trials: int = 40
    sampler: str = "auto"
    proxy: str = "auto"
    repeats: int = 3
    early_end: EarlyEnd | None = DEFAULT_RULE

    def __post_init__(self) -> None:
        if self.trials < LEAST_TRIALS:
            raise UserError(
                f"--trials is {self.trials}; expected {LEAST_TRIALS} or more: uniform and two start points come first"
            )
        if self.repeats < 1:
            raise UserError(f"--repeats is {self.repeats}; expected 1 or more")
        last = self.seed + self.repeats - 1
        if self.seed <= LARGEST_SEED < last:
            raise UserError(
                f"--seed is {self.seed}, and --repeats {self.repeats} also trains with {last}; expected a --seed of "
                f"{LARGEST_SEED - self.repeats + 1} at most, or fewer --repeats"
            )

    @property
    def uniform_trials(self) -> int:
        """Number of trials that tune the uniform learning rate: a fifth of all, 2 at least."""
        return max(2, round(self.trials / 5))

    @property
    def ratio_trials(self) -> int:
        """Number of trials that search the ratios."""
        return self.trials - self.uniform_trials

    @property
    def sampler_name(self) -> str:
        """Name of the sampler of the ratios."""
        return AUTO if self.sampler == "auto" else self.sampler

    @property
    def seed(self) -> int:
        """Seed of the sampler, of the initial weights and of the data order of all trials."""
        return self.base.seed

    @property
    def model(self) -> ModelConfig:
        """The model that is trained."""
        return proxy_model(self.base.model, self.proxy)

    def blocks(self) -> dict[str, int]:
        """Return the number of elements of each block of the proxy."""
        with torch.device("meta"):
            model = split_fused(build_model(self.model, seed=0))
        return {block.value: count for block, count in classify(model).counts().items()}

    @property
    def first_rate(self) -> float:
        """The uniform base learning rate to begin with: the configuration's own, put in terms of a uniform run."""
        optim = self.base.optim
        measured = optim.ratios.partition(":")[0] in _RULES
        return optim.base_lr * 4 if measured else optim.base_lr

    def space(self, blocks: Mapping[str, int]) -> Space:
        """Return the space of the ratios of these blocks; of no block, the space of a uniform learning rate.

        The reference with ratio 1 is FFN, or the largest block of a model without it.
        """
        reference = Block.FFN.value
        if blocks and reference not in blocks:
            reference = max(blocks, key=lambda block: blocks[block])
        middle = math.log2(self.first_rate)
        return Space(list(blocks), reference, base_lr=(middle - _RATE_RANGE, middle + _RATE_RANGE))

    def uniform_start(self) -> list[Point]:
        """Return the first point of the uniform search."""
        return [Point(float(f"{self.first_rate:.4g}"), _WARMUP)]

    def ratio_start(self, space: Space, uniform: Point) -> list[Point]:
        """Return the best points known, for a tuned uniform one.

        The default ratios with nothing else changed, and `measured` at a quarter of the uniform rate with a warm-up of
        15 % (docs/how-to/choose-ratios-and-learning-rate.md).
        """
        return [
            space.from_ratios(uniform.base_lr, uniform.warmup, DEFAULT_RATIOS),
            space.from_ratios(uniform.base_lr / 4, _WARMUP, MEASURED_RATIOS),
        ]

    def config(self, point: Point, seed: int | None = None) -> TrainConfig:
        """Return the training run of a point.

        Args:
            point: base learning rate, warm-up and ratios.
            seed: seed of the run. Default: that of the search.
        """
        base = self.base
        log_every = max(1, min(base.log_every, base.steps // 20))
        return replace(
            base,
            model=self.model,
            seed=self.seed if seed is None else seed,
            init_seed=None,
            data_seed=None,
            log_every=log_every,
            eval_every=0,
            save_every=-(-base.save_every // log_every) * log_every,
            keep_checkpoints=1,
            report_to="none",
            sharpness_every=0,
            sharpness_at=(),
            optim=replace(
                base.optim,
                base_lr=point.base_lr,
                warmup_fraction=point.warmup,
                warmup_steps=None,
                ratios=spell_ratios(point.ratios),
                re_measure=0,
            ),
        )

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for a search to be continued.

        The number of trials and of repeats may grow. The sampler may change, because any sampler can continue from the
        trials of another.
        """
        fields = {name: value for name, value in identity(self.base).items() if name not in _UNUSED}
        rule = self.early_end
        return {
            **fields,
            "proxy": describe_size(self.model),
            "early_end": rule and [rule.share, rule.margin, rule.rows],
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        rule = self.early_end
        return {
            "base": self.base.to_dict(),
            "trials": self.trials,
            "sampler": self.sampler,
            "proxy": self.proxy,
            "repeats": self.repeats,
            "early_end": rule and {"share": rule.share, "margin": rule.margin, "rows": rule.rows},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SearchPlan:
        """Return the plan that :meth:`to_dict` wrote."""
        rule = values["early_end"]
        return cls(
            base=config_from_dict(values["base"]),
            trials=values["trials"],
            sampler=values["sampler"],
            proxy=values["proxy"],
            repeats=values["repeats"],
            early_end=None if rule is None else EarlyEnd(**rule),
        )
