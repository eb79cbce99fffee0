"""Points and vectors say the same, whatever the blocks."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockwise_lr.blocks import Block
from blockwise_lr.optim.ratios import MEASURED_RATIOS
from blockwise_lr.tune.space import Point, Space

BLOCKS = [block.value for block in Block if block is not Block.FFN]
spaces = st.lists(st.sampled_from(BLOCKS), unique=True).map(Space)


@st.composite
def space_and_vector(draw):
    space = draw(spaces)
    inside = [draw(st.floats(low, high)) for low, high in zip(space.low, space.high)]
    return space, np.array(inside)


@given(space_and_vector())
def test_a_vector_becomes_a_point_and_back_to_four_digits(pair):
    space, vector = pair
    assert space.vector(space.point(vector)) == pytest.approx(vector, abs=1e-3)


@given(space_and_vector())
def test_a_point_is_the_same_after_json(pair):
    space, vector = pair
    point = space.point(vector)
    assert Point.from_dict(json.loads(json.dumps(point.to_dict()))) == point


@given(space_and_vector())
def test_clipping_changes_nothing_inside_the_box_and_moves_the_rest_into_it(pair):
    space, vector = pair
    assert (space.clip(vector) == vector).all()
    far = space.clip(vector + 100.0)
    assert (far == space.high).all()


@given(st.floats(0.1, 10.0))
def test_ratios_scaled_together_against_the_base_rate_are_the_same_point(factor):
    space = Space(BLOCKS)
    measured = {block.value: ratio for block, ratio in MEASURED_RATIOS.items()}
    scaled = {block.value: factor * measured.get(block.value, 1.0) for block in Block}
    a, b = space.from_ratios(2e-3, 0.15, measured), space.from_ratios(2e-3 / factor, 0.15, scaled)
    assert space.vector(a) == pytest.approx(space.vector(b), abs=1e-3)


def test_the_reference_has_no_dimension():
    assert Space(["emb", "ssm", "conv"], reference="ssm").names == ("base_lr", "warmup", "emb", "conv")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Space(["emb", "emb"]), "expected every block once"),
        (lambda: Space([], base_lr=(1.0, 0.0)), "expected a lower bound first"),
        (lambda: Space([], warmup=(-math.inf, 0.0)), "expected a lower bound first"),
        (
            lambda: Space(["emb"]).vector(Point(1e-3, 0.1, {"vo": 2.0})),
            "has a ratio for vo; this space searches",
        ),
        (
            lambda: Space(["emb"]).vector(Point(1e-3, 0.1, {"ffn": 2.0})),
            "has ratio 2 for ffn; its ratio is 1 here",
        ),
        (lambda: Space(["emb"]).point([0.0]), "a vector of 1 values; expected 3"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
