"""The paper's principle: the order of the blocks by sharpness, and how well a measurement agrees with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from blockwise_lr.blocks import Block
from blockwise_lr.extras import missing
from blockwise_lr.sharpness.estimate import Estimate

PAPER_ORDER = (Block.EMB, Block.QK, Block.FFN, Block.VO, Block.NORM)
"""The paper's blocks from flattest to sharpest (arXiv 2502.19002, the sharpness disparity principle)."""


def in_paper_order(blocks: Iterable[Block]) -> list[Block]:
    """Return the blocks in the order of the paper's principle, followed by the others.

    Example:
        >>> [block.value for block in in_paper_order([Block.HEAD, Block.NORM, Block.EMB])]
        ['emb', 'norm', 'head']
    """
    present = set(blocks)
    return [b for b in (*PAPER_ORDER, *(b for b in Block if b not in PAPER_ORDER)) if b in present]


def order_agreement(report: Mapping[Block, Estimate]) -> float:
    """Return Kendall's tau-b between the measured order of S and the paper's EMB < QK < FFN < VO < NORM.

    Only the paper's blocks that were measured count. With all five, each further pair in the wrong order costs 0.2.
    One of 120 random orders reaches 1, so a single tau is weak evidence.

    Args:
        report: a SharpnessReport, or any mapping from Block to Estimate.

    Returns:
        1 for the paper's order, -1 for its reverse.

    Raises:
        ValueError: fewer than two of the paper's blocks were measured.
        ModuleNotFoundError: scipy is missing. The message names the extra to install.

    Example:
        >>> from blockwise_lr.sharpness import Estimate
        >>> means = {Block.EMB: 1e-6, Block.FFN: 3e-6, Block.VO: 2e-6}
        >>> round(order_agreement({block: Estimate(mean, 0.0, 1) for block, mean in means.items()}), 3)
        0.333
    """
    try:
        from scipy.stats import kendalltau
    except ModuleNotFoundError:
        raise missing("Kendall's tau needs", "scipy", "train") from None

    measured = [block for block in PAPER_ORDER if block in report]
    if len(measured) < 2:
        names = ", ".join(block.name for block in PAPER_ORDER)
        raise ValueError(
            f"an order needs two blocks of {names}; the report has {', '.join(b.name for b in report) or 'none'}"
        )
    return float(kendalltau(range(len(measured)), [report[block].mean for block in measured]).statistic)
