"""The learning rate of each block over the scale of its weights before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from blockwise_lr.blocks import Block
from blockwise_lr.optim.initial_scales import scale_factor, scales_of_rms
from blockwise_lr.optim.ratios import resolve_ratios
from blockwise_lr.train.config import ModelConfig
from blockwise_lr.train.initial_rms import initial_scales_of


@dataclass(frozen=True)
class StartingScales:
    """Ratios and initial scales of the blocks of a model.

    Args:
        ratios: the learning rate of each block over the base learning rate.
        rms: the RMS of each block's weights before training. 0: they start at zero. None: it is not known.
        lr_over_rms: learning rate over RMS, relative to FFN's. None: one of the two scales is 0 or not known.
    """

    ratios: Mapping[Block, float]
    rms: Mapping[Block, float | None]
    lr_over_rms: Mapping[Block, float | None]

    @classmethod
    def of(
        cls,
        blocks: Iterable[Block],
        rms: Mapping[Block, float | None],
        ratios: Mapping[Block, float],
        *,
        relative_to_init: bool = False,
    ) -> StartingScales:
        """Return the scales of a model.

        Args:
            blocks: the blocks of the model.
            rms: the RMS of each block before training; blocks that are missing are not known.
            ratios: the ratios as they are given; blocks that are missing have ratio 1.
            relative_to_init: whether the ratios relate to the initial scale.

        Raises:
            ValueError: ratios relate to the initial scale, and a block has none.

        Example:
            >>> rms = {Block.EMB: 1.0, Block.FFN: 0.02}
            >>> StartingScales.of(rms, rms, {Block.EMB: 16}, relative_to_init=True).ratios[Block.EMB]
            800.0
        """
        own, scales = resolve_ratios(ratios), scales_of_rms(rms)
        of_model = [block for block in Block if block in set(blocks)]
        factor = {b: scale_factor(b, scales) if relative_to_init else 1.0 for b in of_model}
        used = {block: own[block] * factor[block] for block in of_model}
        ffn = scales.get(Block.FFN)
        over = {
            block: None if ffn is None or block not in scales else _over(block, used, scales)
            for block in of_model
        }
        return cls(used, {block: rms.get(block) for block in of_model}, over)


def _over(block: Block, ratios: Mapping[Block, float], scales: Mapping[Block, float]) -> float:
    return ratios[block] / scales[block] / (ratios[Block.FFN] / scales[Block.FFN])


def peak_lr_over_rms(
    model: ModelConfig, base_lr: float, ratios: Mapping[Block, float], *, relative_to_init: bool
) -> dict[str, float]:
    """Return the peak learning rate of each block over the RMS of its weights before training, by the block's name.

    Args:
        model: the model; a block of it that starts at zero is left out.
        base_lr: the base learning rate.
        ratios: the ratios as they are given; blocks that are missing have ratio 1.
        relative_to_init: whether the ratios relate to the initial scale.
    """
    scales = initial_scales_of(model)
    start = StartingScales.of(scales, scales, ratios, relative_to_init=relative_to_init)
    return {block.value: base_lr * start.ratios[block] / rms for block, rms in scales.items()}
