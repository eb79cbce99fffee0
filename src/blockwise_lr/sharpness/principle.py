"""The paper's principle: the order of the blocks' sharpness, and how far a measurement follows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from blockwise_lr.blocks import Block
from blockwise_lr.extras import missing
from blockwise_lr.sharpness.estimate import Estimate

PAPER_ORDER = (Block.EMB, Block.QK, Block.FFN, Block.VO, Block.NORM)
"""Flattest to sharpest, as the paper's principle has it (METHOD section 2)."""


def in_paper_order(blocks: Iterable[Block]) -> list[Block]:
    """The paper's five as the principle orders them, then the others.

    Example:
        >>> [block.value for block in in_paper_order([Block.HEAD, Block.NORM, Block.EMB])]
        ['emb', 'norm', 'head']
    """
    present = set(blocks)
    return [b for b in (*PAPER_ORDER, *(b for b in Block if b not in PAPER_ORDER)) if b in present]


def order_agreement(report: Mapping[Block, Estimate]) -> float:
    """Kendall's tau-b between the measured order of S and the paper's EMB < QK < FFN < VO < NORM.

    Only the paper's blocks count, and of these the ones that were measured. With all five, two blocks more in the
    wrong order cost 0.2, and 1 is reached by chance in 1 of 120 orders: one tau alone proves little.

    Args:
        report: a SharpnessReport, or any mapping from Block to Estimate.

    Returns:
        1 for the paper's order, -1 for its reverse.

    Raises:
        ValueError: fewer than two of the paper's blocks were measured.
        ModuleNotFoundError: scipy is missing; says which extra to install.

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
