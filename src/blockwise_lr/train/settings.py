"""A run's configuration as typed values: text is parsed, and "auto" and None are replaced by what they stand for."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from blockwise_lr.blocks import Block
from blockwise_lr.errors import UserError
from blockwise_lr.integrations.moving_ratios import MovingRule
from blockwise_lr.optim.block_values import digits, format_pairs, parse_pairs
from blockwise_lr.optim.clipping import resolve_max_norm
from blockwise_lr.optim.decay import NoDecay, check_weight_decays
from blockwise_lr.optim.ratios import spell_ratios
from blockwise_lr.optim.warmup import warmup_in_steps
from blockwise_lr.optimizers.registry import resolve_weight_decay
from blockwise_lr.train.config import OptimConfig, TrainConfig
from blockwise_lr.train.initial_rms import initial_scales_of
from blockwise_lr.train.ratio_text import is_named, parse_moving, parse_ratios

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class OptimSettings:
    """The typed values of a run's `OptimConfig`.

    Args:
        ratios: the learning-rate ratio of each block that the configuration names; all other blocks have ratio 1.
        relative_to: the initial scale of each block that the ratios relate to; None: they relate to learning rates.
        moving: the rule that moves the ratios during the run; None for fixed ratios.
        weight_decay: the weight decay of each block that `weight_decay_by_block` does not name.
        weight_decay_by_block: the weight decay of each block that the configuration names.
        no_decay: the blocks without weight decay, or "1d" for all vectors.
        clip_by_block: the largest gradient norm of every block, or of each block that is named; None for no
            clipping by block.
        warmup_steps: length of the warm-up, in optimizer steps.
    """

    ratios: Mapping[Block, float]
    relative_to: Mapping[Block, float] | None
    moving: MovingRule | None
    weight_decay: float
    weight_decay_by_block: Mapping[Block, float]
    no_decay: NoDecay
    clip_by_block: float | Mapping[Block, float] | None
    warmup_steps: int

    @classmethod
    def of(cls, config: TrainConfig) -> OptimSettings:
        """Parse the optimizer's part of a configuration.

        Raises:
            ValueError: a field cannot be parsed, names an unknown block, or is out of range.
            ImportError: the optimizer's package is missing.

        Example:
            >>> OptimSettings.of(TrainConfig(optim=OptimConfig(ratios="emb=4"))).ratios[Block.EMB]
            4.0
        """
        optim = config.optim
        moving = parse_moving(optim.ratios, optim.re_measure)
        return cls(
            ratios=parse_ratios(optim.ratios),
            relative_to=initial_scales_of(config.model) if optim.relative_to == "init" else None,
            moving=moving,
            weight_decay=resolve_weight_decay(optim.optimizer, optim.weight_decay),
            weight_decay_by_block=_parse_weight_decay(optim.weight_decay_by_block),
            no_decay=_parse_no_decay(optim.no_decay),
            clip_by_block=_parse_clip(optim.clip_by_block),
            warmup_steps=warmup_steps(config),
        )

    def spell(self, optim: OptimConfig) -> OptimConfig:
        """Return `optim` with these values as canonical text, so that equal settings have equal configurations.

        The contents of a ratios file replace its path.
        """
        return replace(
            optim,
            ratios=optim.ratios if is_named(optim.ratios) else spell_ratios(self.ratios),
            weight_decay_by_block=format_pairs(self.weight_decay_by_block),
            clip_by_block=_spell_clip(self.clip_by_block),
        )


@dataclass(frozen=True)
class Settings:
    """The typed values of a run's configuration, on this machine.

    Args:
        optim: the settings of the optimizer and its schedule.
        device: where the run trains.
        precision: the precision of the training steps.
    """

    optim: OptimSettings
    device: Device
    precision: Precision

    @classmethod
    def of(cls, config: TrainConfig) -> Settings:
        """Parse a configuration and resolve its "auto" fields for this machine.

        Raises:
            ValueError: as :meth:`OptimSettings.of`.
            UserError: the configuration asks for a GPU and torch sees none.
        """
        optim = OptimSettings.of(config)
        device = resolve_device(config.device)
        return cls(optim, device, resolve_precision(config.precision, device))

    def spell(self, config: TrainConfig) -> TrainConfig:
        """Return `config` with these values in it, so that it means the same on every machine and reading."""
        return replace(
            config, device=self.device, precision=self.precision, optim=self.optim.spell(config.optim)
        )


def warmup_steps(config: TrainConfig) -> int:
    """Return the length of the warm-up, in optimizer steps.

    Raises:
        ValueError: `warmup_steps` of the configuration is out of range.
    """
    given = config.optim.warmup_steps
    if given is None:
        return round(config.optim.warmup_fraction * config.steps)
    return int(warmup_in_steps(given, config.steps))


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Device:
    """Return the device that "auto" stands for on this machine: a GPU if there is one.

    Raises:
        UserError: `device` is "cuda" and torch sees no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda, but torch sees no GPU here; use --device cpu, or install a CUDA build of torch"
        )
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def resolve_precision(precision: Literal["auto", "fp32", "bf16"], device: Device) -> Precision:
    """Return the precision that "auto" stands for on a device: bf16 if it has bf16 instructions, otherwise fp32.

    Emulated bf16 is far slower than fp32, for example on a CPU with AVX2 alone, or with AVX-512 but not its bf16 part.
    """
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    # torch's own compiler asks this before it hands a bf16 product to oneDNN, which emulates bf16 on any AVX-512.
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _parse_no_decay(text: str) -> NoDecay:
    return "1d" if text == "1d" else [block.strip() for block in text.split(",") if block.strip()]


def _parse_weight_decay(text: str) -> dict[Block, float]:
    name = "--weight-decay-by-block"
    return check_weight_decays(parse_pairs(text, name), name) if text else {}


def _parse_clip(text: str) -> float | dict[Block, float] | None:
    name = "--clip-by-block"
    if not text:
        return None
    try:
        limit = float(text)
    except ValueError:
        return resolve_max_norm(parse_pairs(text, name), name)
    resolve_max_norm(limit, name)
    return limit


def _spell_clip(max_norm: float | Mapping[Block, float] | None) -> str:
    if max_norm is None:
        return ""
    return format_pairs(max_norm) if isinstance(max_norm, Mapping) else digits(max_norm)
