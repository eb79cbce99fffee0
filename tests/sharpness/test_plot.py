"""The figures: what is drawn is what was measured, in the paper's order, and a file is whole or not there."""

import math
import sys
from dataclasses import replace
from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.artist import Artist
from matplotlib.colors import to_hex
from matplotlib.text import Text

from blockwise_lr import Block, measure_sharpness
from blockwise_lr.drawing import BLOCK_COLOURS, block_colour, figure, log_ticks, save
from blockwise_lr.errors import StorageError
from blockwise_lr.sharpness import Estimate, plot
from blockwise_lr.sharpness.principle import PAPER_ORDER, in_paper_order, order_agreement
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig

GPT2 = ModelConfig("gpt2", hidden_size=16, layers=3, heads=2, vocab_size=40, context=12, tied=True)
PLOTS = [plot.plot_blocks, plot.plot_density, plot.plot_layers]


@pytest.fixture(scope="module")
def evolution():
    """Measurements at steps 0, 1, 2, 10 and 20 of a training."""
    torch.manual_seed(0)
    model, ids = build_model(GPT2, seed=0), torch.randint(40, (8, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = [{"input_ids": half, "labels": half} for half in ids.split(2)]
    reports = []
    for step in range(21):
        if step in (0, 1, 2, 10, 20):
            reports.append(measure_sharpness(model, batches, step=step, histogram=True))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return reports


@pytest.fixture(scope="module")
def report(evolution):
    return evolution[-1]


@pytest.fixture
def axes():
    with figure((6, 4)) as made:
        yield made.add_subplot()


def with_mean(report, **means):
    """The report with the means of some blocks replaced."""
    changed = {Block(name): report[name]._replace(mean=mean) for name, mean in means.items()}
    return replace(report, blocks={**report.blocks, **changed})


def texts(axes):
    return [text.get_text() for text in axes.figure.findobj(Text)]


# Bars


def test_the_bars_are_the_blocks_means_in_the_papers_order_and_then_the_others(axes, report):
    plot.draw_blocks(axes, report)
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == ["EMB", "QK", "FFN", "VO", "NORM", "POS"]
    assert [bar.get_height() for bar in axes.patches] == [report[name.lower()].mean for name in names]
    assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == [
        BLOCK_COLOURS[name.lower()].lower() for name in names
    ]
    assert axes.get_yscale() == "log"


def test_the_error_bars_are_one_standard_error_each_way(axes, report):
    plot.draw_blocks(axes, report)
    (bars,) = axes.collections
    for segment, block in zip(bars.get_segments(), [*PAPER_ORDER, Block.POS]):
        low, high = segment[:, 1]
        assert high == pytest.approx(report[block].mean + report[block].stderr)
        assert low == pytest.approx(report[block].mean - min(report[block].stderr, 0.9 * report[block].mean))


def test_a_single_draw_has_bars_without_error_bars(axes, report):
    single = replace(report, blocks={b: e._replace(stderr=math.nan) for b, e in report.blocks.items()})
    plot.draw_blocks(axes, single)
    assert all(np.ptp(segment[:, 1]) == 0 for segment in axes.collections[0].get_segments())


def test_a_negative_estimate_is_written_in_its_place_without_a_bar(axes, report):
    plot.draw_blocks(axes, with_mean(report, qk=-2e-5, vo=0.0))
    assert len(axes.patches) == len(report) - 2
    assert [label.get_text() for label in axes.get_xticklabels()][1] == "QK"
    assert {"-2.0e-05", "0.0e+00", "no bar: not above 0"} <= set(texts(axes))


# Evolution


def test_the_lines_are_the_measured_means_over_the_steps(axes, evolution):
    plot.draw_evolution(axes, list(reversed(evolution)))
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["NORM", "VO", "FFN", "QK", "EMB", "POS"]
    for name, line in lines.items():
        assert line.get_xdata().tolist() == [0, 1, 2, 10, 20]
        assert line.get_ydata().tolist() == [report[name.lower()].mean for report in evolution]
        assert line.get_color() == block_colour(name.lower())


def test_the_band_is_one_standard_error_wide(axes, evolution):
    plot.draw_evolution(axes, evolution)
    band = axes.collections[0].get_paths()[0].vertices  # NORM's: the first drawn
    for report in evolution:
        at = band[band[:, 0] == report.step, 1]
        norm = report[Block.NORM]
        assert at.max() == pytest.approx(norm.mean + norm.stderr)
        assert at.min() == pytest.approx(norm.mean - norm.stderr)


def test_a_line_has_a_gap_where_an_estimate_is_negative(axes, evolution):
    plot.draw_evolution(axes, [*evolution[:2], with_mean(evolution[2], qk=-1e-6), *evolution[3:]])
    (line,) = [line for line in axes.lines if line.get_label() == "QK"]
    assert np.isnan(line.get_ydata()).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    "steps",
    [
        range(0, 10_001, 100),
        [0, 1, 2, 10, 50, 100],
        [0, 400, 800, 4_000, 20_000, 40_000],
        [5, 6],
        range(0, 30),
    ],
)
def test_labels_of_steps_do_not_overlap_and_have_the_first_and_the_last(steps, report):
    with figure((7.2, 4.4)) as made:
        axes = made.add_subplot()
        plot.draw_evolution(axes, [replace(report, step=step) for step in steps])
        made.draw_without_rendering()
        labels = [label for label in axes.get_xticklabels() if label.get_text()]
        boxes = [label.get_window_extent() for label in labels]
    assert labels[0].get_text() == f"{steps[0]:,}"
    assert labels[-1].get_text() == f"{steps[-1]:,}"
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_measurements_without_a_step_are_left_out(axes, evolution):
    plot.draw_evolution(axes, [*evolution[:2], replace(evolution[2], step=None)])
    assert axes.lines[0].get_xdata().tolist() == [0, 1]


def test_an_evolution_of_one_step_or_of_a_step_twice_is_refused(evolution, tmp_path):
    path = tmp_path / "evolution.png"
    with pytest.raises(ValueError, match="an evolution needs measurements at two steps or more; there are 1"):
        plot.plot_evolution(evolution[:1], path)
    with pytest.raises(ValueError, match="an evolution needs measurements at two steps or more; there are 0"):
        plot.plot_evolution([], path)
    with pytest.raises(ValueError, match="is of one training; there are several measurements of step 1$"):
        plot.plot_evolution([*evolution, evolution[1]], path)


# Density


def test_the_area_under_a_blocks_density_is_the_share_of_elements_with_a_gradient(axes, report):
    plot.draw_density(axes, report)
    drawn = {patch.get_label(): patch.get_data() for patch in axes.patches}
    assert list(drawn) == ["NORM", "VO", "FFN", "QK", "EMB", "POS"]
    for name, (density, edges, _) in drawn.items():
        h = report.histograms[Block(name.lower())]
        area = (density * np.diff(np.log10(edges))).sum()
        assert area == pytest.approx(sum(h.counts) / (sum(h.counts) + h.zeros))
        assert np.log10(edges[0]) == pytest.approx(h.start)


def test_a_block_of_many_elements_is_drawn_bin_by_bin(axes, report):
    h = report.histograms[Block.FFN]
    many = h._replace(counts=[100 * count for count in h.counts])
    assert sum(h.counts) < 20_000 < sum(many.counts)
    plot.draw_density(axes, replace(report, histograms={Block.FFN: many}))
    density, _, _ = axes.patches[0].get_data()
    total = sum(many.counts) + many.zeros
    assert density == pytest.approx(np.array(many.counts) / (total * many.width))


def test_elements_that_no_gradient_reached_are_in_the_title(report, tmp_path):
    rows = report.histograms[Block.POS]
    half = replace(report, histograms={Block.POS: rows._replace(zeros=sum(rows.counts))})
    path = plot.plot_density(half, tmp_path / "density.svg")
    assert "step 20, fisher, 88 samples; no gradient: POS 50%" in comments(path)


def test_a_report_without_histograms_has_no_density(report, tmp_path):
    with pytest.raises(ValueError, match="holds no histograms: measure with histogram=True"):
        plot.plot_density(replace(report, histograms={}), tmp_path / "density.png")


# Layers


def test_the_heat_map_holds_every_layers_estimates_and_what_is_outside_comes_last(axes, report):
    plot.draw_layers(axes, report)
    values = axes.images[0].get_array().filled(np.nan)
    blocks = [label.get_text().lower() for label in axes.get_xticklabels()]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2", "outside"]
    assert axes.get_ylabel() == "transformer.h"
    for row, layer in zip(values, ["transformer.h.0", "transformer.h.1", "transformer.h.2", "outside"]):
        found = {block: value for block, value in zip(blocks, row) if not np.isnan(value)}
        assert found == {
            b.value: pytest.approx(math.log10(e.mean)) for b, e in report.per_layer[layer].items()
        }


def test_a_negative_layer_is_written_without_a_colour(axes, report):
    layers = {name: dict(found) for name, found in report.per_layer.items()}
    layers["transformer.h.1"][Block.QK] = Estimate(-3e-5, 1e-5, 10)
    plot.draw_layers(axes, replace(report, per_layer=layers))
    assert np.isnan(axes.images[0].get_array().filled(np.nan)[1, 1])
    assert "-3.0e-05" in texts(axes)


def test_long_names_of_layers_are_shortened_and_two_stacks_told_apart(axes, report):
    found = report.per_layer["transformer.h.0"]
    names = ["m.encoder.layers.0", "m.decoder.layers.0", "m." + "very_long_name_" * 5 + ".0"]
    plot.draw_layers(axes, replace(report, per_layer=dict.fromkeys(names, found)))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["encoder.layers.0", "decoder.layers.0", "very_long_nam…y_long_name_.0"]
    assert axes.get_ylabel() == "m"


# Files


@pytest.mark.parametrize("draw", PLOTS)
def test_a_figure_is_a_picture_with_nothing_beside_it_and_the_same_every_time(draw, report, tmp_path):
    path = draw(report, tmp_path / "first.png")
    draw(report, tmp_path / "second.png")
    assert path == tmp_path / "first.png"
    assert matplotlib.image.imread(path).std() > 0.01
    assert sorted(file.name for file in tmp_path.iterdir()) == ["first.png", "second.png"]
    assert path.read_bytes() == (tmp_path / "second.png").read_bytes()


@pytest.mark.parametrize(("ending", "begins"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")])
def test_the_name_says_the_format(ending, begins, evolution, tmp_path):
    path = plot.plot_evolution(evolution, tmp_path / f"evolution.{ending}")
    again = plot.plot_evolution(evolution, tmp_path / f"again.{ending}")
    assert path.read_bytes().startswith(begins)
    assert path.read_bytes() == again.read_bytes()


def test_another_ending_is_refused(report, tmp_path):
    with pytest.raises(
        ValueError, match="s.jpeg: a figure's name ends in .png, .svg or .pdf, not in '.jpeg'"
    ):
        report.plot(tmp_path / "s.jpeg")


def test_a_figure_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    class Broken(Artist):
        def draw(self, renderer):
            raise RuntimeError("no")

    path = tmp_path / "figure.png"
    path.write_bytes(b"old")
    with figure((2, 2)) as made:
        made.add_artist(Broken())
        with pytest.raises(RuntimeError, match="no"):
            save(made, path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_a_figure_in_a_place_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").touch()
    with figure((2, 2)) as made, pytest.raises(StorageError, match=r"file/a\.png \(Not a directory\)"):
        save(made, tmp_path / "file" / "a.png")


def plot_two_steps(report, path):
    return plot.plot_evolution([replace(report, step=step) for step in (0, 1)], path)


@pytest.mark.parametrize("draw", [plot.plot_blocks, plot.plot_layers, plot_two_steps])
def test_nothing_above_zero_is_refused(draw, report, tmp_path):
    negative = {block: e._replace(mean=-1.0) for block, e in report.blocks.items()}
    layers = {"outside": negative}
    with pytest.raises(ValueError, match="above 0, so there is nothing to draw on a logarithmic scale"):
        draw(replace(report, blocks=negative, per_layer=layers), tmp_path / "figure.png")


@pytest.mark.parametrize("draw", PLOTS)
def test_one_block_alone_and_no_norm_are_drawn(draw, report, tmp_path, recwarn):
    only = replace(
        report,
        blocks={Block.FFN: report[Block.FFN]},
        histograms={Block.FFN: report.histograms[Block.FFN]},
        per_layer={"h.0": {Block.FFN: report[Block.FFN]}},
    )
    draw(only, tmp_path / "figure.png")
    assert not [w for w in recwarn if "layout" in str(w.message)]  # nothing squeezed out of the picture


def test_without_matplotlib_the_extra_is_named(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"figures need matplotlib, which is not installed: pip install '.\[plot\]'"
    ):
        report.plot(tmp_path / "figure.png")


# Logarithmic axes


@pytest.mark.parametrize(
    ("limits", "labels"),
    [
        ((2e-5, 3e-1), ["10⁻⁴", "10⁻³", "10⁻²", "10⁻¹"]),
        ((8e-6, 7e-5), ["10⁻⁵", "2·10⁻⁵", "5·10⁻⁵"]),
    ],
)
def test_a_logarithmic_axis_is_labelled_without_mathematics(axes, limits, labels):
    axes.set_ylim(limits)
    log_ticks(axes.yaxis)
    axes.figure.draw_without_rendering()
    low, high = limits
    shown = [tick for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert [tick.label1.get_text() for tick in shown] == labels


# The principle


def estimates(**means):
    return {Block(name): Estimate(mean, 0.0, 1) for name, mean in means.items()}


@pytest.mark.parametrize(
    ("means", "tau"),
    [
        ({"emb": 1, "qk": 2, "ffn": 3, "vo": 4, "norm": 5}, 1.0),
        ({"emb": 5, "qk": 4, "ffn": 3, "vo": 2, "norm": 1}, -1.0),
        ({"emb": 1, "ffn": 2, "qk": 3, "vo": 4, "norm": 5}, 0.8),
        # The other blocks are in no order; a negative estimate is flatter than all others.
        ({"emb": 1, "qk": -2, "ffn": 3, "vo": 4, "norm": 5, "head": 9, "pos": 0}, 0.8),
        ({"qk": 2, "norm": 1}, -1.0),
    ],
)
def test_order_agreement_is_kendalls_tau_over_the_papers_blocks(means, tau):
    assert order_agreement(estimates(**means)) == pytest.approx(tau)


def test_order_agreement_reads_a_report(report):
    means = [report[block].mean for block in PAPER_ORDER]
    pairs = [(a < b) - (a > b) for i, a in enumerate(means) for b in means[i + 1 :]]
    assert order_agreement(report) == pytest.approx(sum(pairs) / 10)


def test_an_order_of_one_block_is_refused():
    with pytest.raises(
        ValueError, match="an order needs two blocks of EMB, QK, FFN, VO, NORM; the report has NORM, HEAD"
    ):
        order_agreement(estimates(norm=1, head=2))


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"Kendall's tau needs scipy, which is not installed: pip install '.\[train\]'",
    ):
        order_agreement(estimates(norm=1, emb=2))


def test_the_papers_order_is_flattest_first():
    assert [block.value for block in PAPER_ORDER] == ["emb", "qk", "ffn", "vo", "norm"]
    assert in_paper_order(Block)[:5] == list(PAPER_ORDER)
    assert set(in_paper_order(Block)) == set(Block)


def comments(path):
    """The texts of an SVG, which matplotlib draws as shapes and repeats as comments."""
    return [
        line.strip()[5:-4]
        for line in path.read_text("utf-8").splitlines()
        if line.strip().startswith("<!-- ")
    ]
