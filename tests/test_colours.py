"""One colour a block in every figure, and no two series that look alike."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from blockwise_lr import Block
from blockwise_lr.drawing import block_colour, figure, series_style

LAYER = Path(__file__).parents[1] / "docs" / "concepts" / "layer.svg"
SVG = "{http://www.w3.org/2000/svg}"
BLOCK_OF = {
    "embedding": "emb", "query": "qk", "key": "qk", "value": "vo", "output": "vo", "norm": "norm",
    "gate and up": "ffn", "down": "ffn", "head": "head",
}  # fmt: skip


def test_no_two_blocks_share_a_colour():
    colours = {block: block_colour(block).lower() for block in Block}
    assert len(set(colours.values())) == len(colours)


@pytest.mark.parametrize("count", [2, 7, 30, 37, 100, 500])
def test_no_two_series_look_alike(count):
    looks = [series_style(i) for i in range(count)]
    assert all(looks[i] != look for look in looks for i in range(looks.index(look)))
    assert len({repr(sorted(look.items())) for look in looks}) == count


def test_matplotlib_draws_every_look(tmp_path):
    with figure((4, 3)) as made:
        axes = made.add_subplot()
        for i in range(0, 500, 33):
            axes.plot([0, 1], [i, i], label=str(i), **series_style(i))
        axes.legend()
        made.savefig(tmp_path / "looks.png")
    assert (tmp_path / "looks.png").stat().st_size > 1000


def test_the_drawing_of_a_layer_has_the_colours_of_the_figures():
    root = ElementTree.parse(LAYER).getroot()
    boxes = [box for box in root.iter(f"{SVG}rect") if "fill-opacity" in box.attrib]
    texts = [(float(t.get("x")), float(t.get("y")), t.text or "") for t in root.iter(f"{SVG}text")]

    def text_of(box) -> str:
        x, y, width, height = (float(box.get(key)) for key in ("x", "y", "width", "height"))
        inside = [s for a, b, s in texts if x <= a <= x + width and y <= b <= y + height]
        beside = [s for a, b, s in texts if x + width <= a <= x + width + 12 and y <= b <= y + height]
        return (inside or beside)[0]

    named = {text_of(box): box.get("fill") for box in boxes}
    for text, fill in named.items():
        block = BLOCK_OF.get(text) or re.match(r"[A-Z]+", text)[0].lower()
        assert fill.lower() == block_colour(block).lower(), text
    assert set(named) == {*BLOCK_OF, "EMB", "QK", "VO", "FFN", "NORM", "HEAD (EMB if tied)"}
    plain = {box.get("fill") for box in root.iter(f"{SVG}rect")} - {box.get("fill") for box in boxes}
    assert plain == {"#fff"}
