"""What all figures share: colours, style, and writing files without a window system.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockwise_lr.blocks import Block
from blockwise_lr.extras import missing
from blockwise_lr.files import remove_temporary, storing

BLOCK_COLOURS = {
    "emb": "#0072B2", "qk": "#56B4E9", "vo": "#D55E00", "ffn": "#009E73", "norm": "#000000", "head":
    "#CC79A7", "pos": "#E69F00", "qkv": "#5E4FA2", "router": "#8C510A", "ssm": "#B8A800", "conv": "#882255",
    "other": "#999999",
}  # fmt: skip
"""The colour of every block, in figures and in docs/concepts/layer.svg."""
SERIES_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
OTHER_COLOUR = "#999999"
STYLE: Any = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color":
    "#e6e6e6", "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.edgecolor": "#777777",
    "axes.labelcolor": "#333333", "xtick.color": "#555555", "ytick.color": "#555555", "legend.frameon":
    False, "figure.constrained_layout.use": True, "text.parse_math": False,  # names may contain a $
    "svg.hashsalt": "blockwise-lr",
}  # fmt: skip


def block_colour(block: Block | str) -> str:
    """Return the colour of a block in every figure."""
    return BLOCK_COLOURS.get(str(block), OTHER_COLOUR)


def series_style(index: int) -> dict[str, Any]:
    """Return the style of one series in a figure: colour, dashes and marker, as keywords of matplotlib's ``plot``.

    No two indices have the same style. The first six have a colour each. The next thirty combine these colours with
    other dashes. All further ones have markers, too.

    Args:
        index: position of the series, from 0.

    Example:
        >>> series_style(0)["color"] == series_style(6)["color"], series_style(0) == series_style(6)
        (True, False)
    """
    colours, dashes = len(SERIES_COLOURS), len(_DASHES)
    turn, place = divmod(index, colours)
    again = turn // dashes  # how often all pairs of colour and dashes are used up
    style: dict[str, Any] = {"color": SERIES_COLOURS[place], "linestyle": _DASHES[(place + turn) % dashes]}
    if again:
        # After the named markers, use regular polygons with more and more corners: (corners, style, angle).
        style["marker"] = _MARKERS[again - 1] if again <= len(_MARKERS) else (again, 0, 0)
    return style


@contextmanager
def figure(size: tuple[float, float]) -> Iterator[Any]:
    """Yield a matplotlib figure in the style of the project.

    It does not use pyplot, which would choose a window system and keep figures in memory.

    Args:
        size: width and height in inches.

    Raises:
        ModuleNotFoundError: matplotlib is missing. The message names the extra to install.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise missing("figures need", "matplotlib", "plot") from None

    with mpl.rc_context(STYLE):
        made = Figure(figsize=size)
        FigureCanvasAgg(made)
        yield made


def log_ticks(axis: Any) -> None:
    """Make an axis logarithmic, with labels such as 10⁻³ or 2·10⁻³ in plain characters.

    matplotlib's own labels are mathematical text, which STYLE turns off. An axis of fewer than two decades also has
    ticks at 2 and 5. Call this after everything is drawn and the limits are set.

    Args:
        axis: ``axes.xaxis`` or ``axes.yaxis``.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = getattr(axis.axes, f"get_{axis.axis_name}lim")()
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,), numticks=9))
    axis.set_major_formatter(lambda value, _: power_of_ten(value))
    axis.set_minor_formatter(NullFormatter())


def power_of_ten(value: float) -> str:
    """Format a positive number as on the axes of figures.

    Example:
        >>> power_of_ten(1e-12), power_of_ten(2e-3), power_of_ten(1.0)
        ('10⁻¹²', '2·10⁻³', '10⁰')
    """
    exponent = math.floor(math.log10(value) + 1e-9)
    power = "10" + str(exponent).translate(_SUPERSCRIPTS)
    factor = f"{value / 10.0**exponent:.3g}"
    return power if factor == "1" else f"{factor}·{power}"


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Leave out the time, so that equal figures are equal files.
_NO_DATE: Any = {".png": None, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def lay_out(made: Any) -> None:
    """Place the axes and labels of a figure once, which otherwise every file that is written of it does again."""
    made.get_layout_engine().execute(made)
    made.set_layout_engine("none")


def save(made: Any, path: str | Path) -> Path:
    """Write a figure in the format of its file ending (png, svg, pdf). The file is complete, or left as it was.

    Args:
        made: the figure.
        path: the file.

    Returns:
        The path.

    Raises:
        ValueError: the file has another ending.
        StorageError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in _NO_DATE:
        raise ValueError(f"{path}: a figure's name ends in .png, .svg or .pdf, not in {path.suffix!r}")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with storing(path):
            made.savefig(temporary, dpi=160, metadata=_NO_DATE[path.suffix])
            temporary.replace(path)
    finally:
        remove_temporary(temporary)
    return path
