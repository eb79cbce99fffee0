"""What all figures share: colours, style, and writing without a window system.

Colours are those of Okabe and Ito, told apart by the colour-blind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockwise_lr.blocks import Block

BLOCK_COLOURS = {
    "emb": "#0072B2", "qk": "#56B4E9", "vo": "#D55E00", "ffn": "#009E73", "norm": "#000000", "head":
    "#CC79A7", "pos": "#E69F00", "qkv": "#F0E442",
}  # fmt: skip
OTHER_COLOUR = "#888888"
STYLE: Any = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color":
    "#e6e6e6", "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.edgecolor": "#777777",
    "axes.labelcolor": "#333333", "xtick.color": "#555555", "ytick.color": "#555555", "legend.frameon":
    False, "figure.constrained_layout.use": True, "text.parse_math": False,  # a name may hold a $
    "svg.hashsalt": "blockwise-lr",
}  # fmt: skip


def block_colour(block: Block | str) -> str:
    """The colour of a block in every figure."""
    return BLOCK_COLOURS.get(str(block), OTHER_COLOUR)


@contextmanager
def figure(size: tuple[float, float]) -> Iterator[Any]:
    """A matplotlib figure in the house style. No pyplot: it would choose a window system and keep figures alive.

    Args:
        size: width and height in inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; says which extra to install.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "figures need matplotlib: pip install 'blockwise-lr[plot]'", name="matplotlib"
        ) from None

    with mpl.rc_context(STYLE):
        made = Figure(figsize=size)
        FigureCanvasAgg(made)
        yield made


def save(made: Any, path: str | Path) -> Path:
    """Write a figure as what its name ends with (png, svg, pdf), whole or not at all.

    Raises:
        ValueError: the name ends otherwise.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path}: a figure's name ends in .png, .svg or .pdf, not in {path.suffix!r}")
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        made.savefig(temporary, dpi=160)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
