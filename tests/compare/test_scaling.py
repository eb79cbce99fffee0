"""Fits over sizes: the power law, its intervals, what is read, the report, and one small real run."""

from __future__ import annotations

import html.parser
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import least_squares
from synthetic_comparison import BASE
from synthetic_trainer import write_run

from blockwise_lr.compare.power_law import fit_power_laws
from blockwise_lr.compare.scaling import _draw, _noise, scaling_content
from blockwise_lr.compare.scaling_report import fit_sizes
from blockwise_lr.compare.scaling_sizes import read_sizes
from blockwise_lr.compare.scaling_wording import _trend, format_count, format_number
from blockwise_lr.errors import UserError
from blockwise_lr.train.build_model import count_parameters
from support.commands import call

SIZES = np.array([1.5e5, 3e5, 6e5, 1.8e6])
WIDTHS = (16, 32, 48, 64)
LAWS = [(3.0, 20.0, 0.3), (0.0, 8.0, 0.07), (1.7, 400.0, 0.34), (2.0, 5e4, 0.9), (3.0, 5.0, 0.05)]
NAMES = ("adamw:uniform", "adamw:half")


def law(sizes: Any, floor: float, amplitude: float, alpha: float) -> Any:
    return floor + amplitude * np.asarray(sizes, dtype=float) ** -alpha


@pytest.mark.parametrize("true", LAWS)
def test_made_losses_give_back_their_law(true):
    found = fit_power_laws(SIZES, law(SIZES, *true))
    assert (found.floor[0], found.amplitude[0], found.alpha[0]) == pytest.approx(true, rel=1e-4, abs=1e-6)
    assert found.residuals == pytest.approx(np.zeros((1, 4)), abs=1e-7)
    assert found.loss([1e4, 1e9])[0] == pytest.approx(law([1e4, 1e9], *true), rel=1e-4)


def test_no_other_law_is_nearer():
    """A general solver from ten starting points finds no smaller sum of squares."""
    generator = np.random.default_rng(0)
    losses = law(SIZES, 3.0, 20.0, 0.3) + generator.normal(0, 0.02, (5, 4))
    found = fit_power_laws(SIZES, losses)
    x = np.log(SIZES / found.centre)
    for row, residuals in zip(losses, found.residuals):
        best = min(
            least_squares(
                lambda p, row=row: p[0] + p[1] * np.exp(-p[2] * x) - row,
                generator.uniform([0, 0, 0.02], [row.min(), 2, 1.5]),
                bounds=([0, 0, 0.01], [np.inf, np.inf, 4]),
            ).cost
            for _ in range(10)
        )
        assert (residuals**2).sum() / 2 <= best * (1 + 1e-6) + 1e-14


def test_sets_that_are_fitted_together_are_fitted_as_each_alone():
    losses = law(SIZES, 3.0, 20.0, 0.3) + np.random.default_rng(1).normal(0, 0.01, (3, 4))
    together = fit_power_laws(SIZES, losses)
    for i, row in enumerate(losses):
        alone = fit_power_laws(SIZES, row)
        assert (alone.floor[0], alone.scale[0], alone.alpha[0]) == pytest.approx(
            (together.floor[i], together.scale[i], together.alpha[i]), rel=1e-12
        )


def test_the_size_for_a_loss_is_the_inverse_of_the_loss():
    found = fit_power_laws(SIZES, law(SIZES, 3.0, 20.0, 0.3))
    for size in (1e5, 7e5, 1e8):
        assert found.size_for(found.loss([size])[:, 0]) == pytest.approx(size, rel=1e-6)
    assert found.size_for([2.9]) == np.inf


def test_a_loss_that_rises_with_size_has_no_amplitude():
    found = fit_power_laws(SIZES, [3.0, 3.1, 3.2, 3.3])
    assert found.scale[0] == 0
    assert found.floor[0] == pytest.approx(3.15)


def test_a_flat_law_has_a_higher_loss_with_no_parameters_and_a_lower_one_with_none_at_all():
    found = fit_power_laws(SIZES, [3.0, 3.01, 3.0, 3.01])
    assert found.scale[0] == 0
    assert found.size_for([3.2]) == 0
    assert found.size_for([2.9]) == np.inf


@pytest.mark.parametrize(
    ("gaps", "rise", "said"),
    [
        ([0.01, 0.02, 0.03, 0.04], 0.01, "The gap grows with size: +0.010"),
        ([0.04, 0.03, 0.02, 0.01], -0.01, "The gap shrinks with size: −0.010"),
        ([-0.04, -0.03, -0.02, -0.01], 0.01, "The gap shrinks with size, in favour of a: +0.010"),
        ([-0.01, -0.02, -0.03, -0.04], -0.01, "The gap grows with size, against a: −0.010"),
        ([-0.02, -0.01, 0.01, 0.02], 0.01, "The gap moves with size, in favour of a: +0.010"),
        ([0.02, 0.01, -0.01, -0.02], -0.01, "The gap moves with size, against a: −0.010"),
    ],
)
def test_the_trend_of_the_gap_is_said_for_the_arm_that_is_behind_too(gaps, rise, said):
    trend = {"mean": rise, "ci95": [rise - 0.001, rise + 0.001]}
    sizes = [{"loss_gap": {"mean": gap}} for gap in gaps]
    assert _trend({"arm": "a", "sizes": sizes, "gap_per_doubling": trend}).startswith(said)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="at least three sizes"):
        fit_power_laws([1e5, 1e6], [3.0, 2.9])
    with pytest.raises(ValueError, match="leave diverged runs out"):
        fit_power_laws(SIZES, [3.0, 2.9, np.inf, 2.8])


@pytest.mark.parametrize("numbers", [12, pytest.param(150, marks=pytest.mark.slow)])
def test_the_intervals_cover_the_law(numbers):
    generator = np.random.default_rng(2)
    true, sizes, seeds = (2.5, 60.0, 0.35), np.geomspace(1e5, 3e7, 6), 3
    covered = np.zeros(3)
    for _ in range(numbers):
        shared = generator.normal(
            0, 0.01, (6, 1, seeds)
        )  # seeds are paired: their noise is common to both arms
        runs = law(sizes, *true)[:, None, None] + shared + generator.normal(0, 0.005, (6, 2, seeds))
        means = runs.mean(axis=2).T
        noise = _noise(list(runs), [fit_power_laws(sizes, row) for row in means])
        assert (noise.degrees, noise.source) == (12, "seeds")
        drawn = fit_power_laws(sizes, _draw(means, noise, [seeds] * 6, 200)[:, 0])
        ends = [np.quantile(v, [0.025, 0.975]) for v in (drawn.floor, drawn.amplitude, drawn.alpha)]
        covered += [low <= value <= high for value, (low, high) in zip(true, ends)]
    assert (covered / numbers >= (0.88 if numbers > 100 else 0.7)).all()


def test_draws_have_the_noise_of_the_seeds():
    runs = [np.random.default_rng(i).normal(0, [[0.02], [0.01]], (2, 400)) for i in range(4)]
    means = np.stack([each.mean(axis=1) for each in runs], axis=1)
    drawn = _draw(means, _noise(runs, []), [400, 100, 100, 25], 4000) - means
    expected = np.array([[0.02], [0.01]]) / np.sqrt([400, 100, 100, 25])
    assert drawn.std(axis=0) == pytest.approx(expected, rel=0.06)


def model(width: int) -> Any:
    return replace(BASE.model, hidden_size=width, layers=1, heads=1, vocab_size=256, context=16)


def write_comparisons(
    out: Path,
    laws: dict[str, tuple[float, float, float]],
    seeds: int = 3,
    widths: Any = WIDTHS,
    models: dict[str, Any] | None = None,
    counted: Any = count_parameters,
    **changes: Any,
) -> list[Path]:
    """Write the folders of finished comparisons whose losses follow laws, with noise that seeds share.

    `counted` returns the number of a model's parameters in the laws.
    """
    folders = []
    for name_of_size, shape in (models or {f"width-{width}": model(width) for width in widths}).items():
        config = replace(BASE, model=shape)
        count = counted(shape)
        arms = {
            name: {
                "optimizer": "adamw", "ratios": name.partition(":")[2], "base_lr": 2e-3, "warmup_fraction": 0.6,
                "horizon": "N", "role": "baseline" if i == 0 else "arm",
                "seeds": [
                    {"seed": seed, "terminal_val_loss": float(law(count, *each)) + 0.01 * (seed - 1) * (1 + 0.1 * i)}
                    for seed in range(seeds)
                ],
            }
            for i, (name, each) in enumerate(laws.items())
        }  # fmt: skip
        arms["adamw:uniform 2N"] = {**next(iter(arms.values())), "horizon": "2N"}
        content = {"config": config.to_dict(), "data": {"content_sha256": "a"}, "arms": arms, "tuned": True}
        folder = out / name_of_size
        folder.mkdir(parents=True)
        (folder / "compare.json").write_text(json.dumps({**content, "at_edge": [], **changes}))
        folders.append(folder)
    return folders


def shifted(factor: float) -> dict[str, tuple[float, float, float]]:
    """Two laws; the baseline needs `factor` times as many parameters for the loss of the other, at every size."""
    return {NAMES[0]: (3.0, 20.0, 0.3), NAMES[1]: (3.0, 20.0 * factor**-0.3, 0.3)}


def content_of(folders: list[Path], **options: Any) -> dict[str, Any]:
    sizes, arms = read_sizes(folders)
    found = scaling_content(sizes, arms, **{"draws": 200, "command": "", "date": "", **options})
    return json.loads(json.dumps(found, allow_nan=False))


def test_a_shift_of_the_law_is_the_factor_of_parameters(tmp_path):
    folders = write_comparisons(tmp_path, shifted(1.5))
    content = content_of(folders[::-1])  # in any order
    assert content["arms"] == list(NAMES)
    counts = [size["parameters"] for size in content["sizes"]]
    assert counts == [count_parameters(model(width)) for width in WIDTHS]
    assert [size["non_embedding"] for size in content["sizes"]] == [
        count - 2 * 256 * width for count, width in zip(counts, WIDTHS)
    ]
    for name, true in shifted(1.5).items():
        fit = content["fits"][name]
        for key, value in zip(("E", "A", "alpha"), true):
            assert fit[key]["value"] == pytest.approx(value, rel=1e-3)
            low, high = fit[key]["ci95"]
            assert (0.0 if low is None else low) <= value * 1.001
            assert high is None or high >= value * 0.999
    (comparison,) = content["comparisons"]
    for size, count in zip(comparison["sizes"], counts):
        factor = size["factor"]
        assert factor["value"] == pytest.approx(1.5, rel=1e-3)
        assert factor["ci95"][0] < 1.5
        assert factor["outside"] == (1.5 * count > counts[-1])
        # Straight lines between the sizes lie above the law, which is convex.
        assert factor["bound"] == ("at_least" if factor["outside"] else "exact")
        assert factor["outside"] or factor["interpolated"] == pytest.approx(1.5, rel=0.12)
        gap = law(count, 3.0, 20.0 * (1 - 1.5**-0.3), 0.3) - 3.0
        assert size["loss_gap"]["mean"] == pytest.approx(gap, rel=1e-6)
    assert comparison["gap_per_doubling"]["mean"] < 0
    assert "adamw:half ends below adamw:uniform at every size" in content["answer"][0]
    assert "needs 1.50 times as many" in content["answer"][-1]


def test_more_seeds_give_narrower_intervals(tmp_path):
    few, many = (
        content_of(write_comparisons(tmp_path / str(seeds), shifted(1.5), seeds)) for seeds in (2, 16)
    )
    sd = {name: found["noise"]["sd"]["adamw:uniform"] for name, found in (("few", few), ("many", many))}
    assert few["noise"]["degrees"] == 4
    assert sd["many"] > sd["few"]  # seeds are spaced evenly, so their spread grows with their number
    scaled = content_of(write_comparisons(tmp_path / "c", shifted(1.5), 3))
    again = content_of(write_comparisons(tmp_path / "d", shifted(1.5), 3))
    assert scaled["fits"] == again["fits"]  # the bootstrap repeats


def test_one_seed_takes_its_noise_from_the_residuals(tmp_path):
    laws = {NAMES[0]: (3.0, 20.0, 0.3), NAMES[1]: (2.9, 19.0, 0.3)}
    folders = write_comparisons(tmp_path, laws, seeds=1)
    path = folders[1] / "compare.json"
    changed = json.loads(path.read_text())
    changed["arms"]["adamw:half"]["seeds"][0]["terminal_val_loss"] += 0.02
    path.write_text(json.dumps(changed))
    content = content_of(folders)
    assert content["noise"]["source"] == "residuals"
    assert content["noise"]["degrees"] == 1
    assert content["noise"]["sd"]["adamw:half"] > 5 * content["noise"]["sd"]["adamw:uniform"]
    assert content["answer"][-1] == "One seed cannot separate an effect from noise."
    assert any(warning.startswith("No size has two seeds.") for warning in content["warnings"])


def test_what_a_fit_cannot_tell_is_said(tmp_path):
    laws = {NAMES[0]: (0.0, 8.0, 0.07), NAMES[1]: (3.0, 20.0, 0.3)}
    folders = write_comparisons(tmp_path, laws, at_edge=["adamw:half"])
    path = folders[2] / "compare.json"
    changed = json.loads(path.read_text())
    for run in changed["arms"]["adamw:half"]["seeds"]:
        run["terminal_val_loss"] += 0.2
    path.write_text(json.dumps(changed))
    warnings = " ".join(content_of(folders)["warnings"])
    assert "4 sizes determine three numbers per arm, which leaves 1 degree of freedom" in warnings
    assert "do not extrapolate" in warnings
    assert "Every size was trained on 15.4K tokens." in warnings
    assert "The law misses the losses of adamw:half by" in warnings
    assert "is at the edge of its grid, for adamw:half (" in warnings


class Page(html.parser.HTMLParser):
    """What a page would load, and whether it has a script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_report_shows_the_numbers_and_loads_nothing(tmp_path):
    hostile = "<script>alert(1)</script>=|`x`"
    laws = {NAMES[0]: (3.0, 20.0, 0.3), hostile: (3.0, 15.0, 0.3)}
    content = fit_sizes(
        write_comparisons(tmp_path, laws), tmp_path / "out", draws=50, command="blockwise-lr scaling"
    )
    assert json.loads((tmp_path / "out" / "scaling.json").read_text()) == content
    page = (tmp_path / "out" / "report.html").read_text()
    assert Page(page).scripts == 0
    assert [load[:26] for load in Page(page).loads] == ["data:image/svg+xml;base64,"] * 3
    report = (tmp_path / "out" / "report.md").read_text()
    for text in (page, report):
        assert format_number(content["fits"][NAMES[0]]["A"]["value"]) in text
        assert "do not extrapolate" in text
    for name in ("scaling", "gaps", "factors"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5_000
        assert f"({name}.png)" in report


def test_mistakes_are_explained(tmp_path):
    folders = write_comparisons(tmp_path / "a", shifted(2))
    counts = ", ".join(f"{count_parameters(model(width)):,}" for width in WIDTHS[:3])
    with pytest.raises(
        UserError, match=rf"needs at least 4 sizes; got 3 \({counts} parameters\): compare more"
    ):
        read_sizes(folders[:3])
    with pytest.raises(UserError, match="holds neither a finished comparison"):
        read_sizes([*folders, tmp_path])
    with pytest.raises(
        UserError, match=f"^{folders[0]} has a second run of adamw:uniform with seed 0 .* seeds$"
    ):
        read_sizes([*folders, folders[0]])
    with pytest.raises(
        UserError, match="no arm 'mine' at every size; the arms that all sizes have: adamw:uniform"
    ):
        read_sizes(folders, ["adamw:uniform", "mine"])
    with pytest.raises(UserError, match="compares a baseline with at least one other arm"):
        read_sizes(folders, ["adamw:uniform"])
    with pytest.raises(UserError, match="given once in --arms; given more than once: adamw:half$"):
        read_sizes(folders, ["adamw:uniform", "adamw:half", "adamw:half"])
    other = write_comparisons(tmp_path / "b", shifted(2), widths=(80,), data={"content_sha256": "b"})
    with pytest.raises(UserError, match=r"differ in text \(a and b\), so their losses do not compare"):
        read_sizes([*folders, *other])
    seeds = write_comparisons(tmp_path / "c", {"adamw:uniform": (3.0, 20.0, 0.3)}, widths=(80,))
    with pytest.raises(UserError, match="compares a baseline with at least one other arm"):
        read_sizes([*folders, *seeds])
    edit(folders[1], model={"heads": 3})
    with pytest.raises(
        UserError, match=f"^cannot build the model of {folders[1]}: hidden size 128 is not a multiple"
    ):
        read_sizes(folders)
    path = folders[0] / "compare.json"
    edit(folders[0], stepz=3)
    with pytest.raises(
        UserError, match=f"^cannot read {path}: configuration: no field named stepz; .* write it$"
    ):
        read_sizes(folders)
    path.write_text("{}")
    with pytest.raises(
        UserError,
        match=f"^cannot read {path}: it has no 'config'; run the compare command again to write it$",
    ):
        read_sizes(folders)


def edit(folder: Path, **changes: Any) -> None:
    """Change the configuration of a comparison."""
    path = folder / "compare.json"
    content = json.loads(path.read_text())
    content["config"] |= changes
    path.write_text(json.dumps(content))


def edit_arm(folder: Path, arm: str, **changes: Any) -> None:
    """Change one arm of a comparison."""
    path = folder / "compare.json"
    content = json.loads(path.read_text())
    content["arms"][arm] |= changes
    path.write_text(json.dumps(content))


def write_runs(out: Path, **changes: Any) -> list[Path]:
    """Write the folders of one finished run at every size."""
    folders = []
    for width in WIDTHS:
        optim = replace(BASE.optim, **changes.get("optim", {}))
        config = replace(BASE, model=model(width), **{**changes, "optim": optim})
        folders.append(out / f"width-{width}")
        write_run(config.to_dict(), folders[-1])
    return folders


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"data": {}}', "it has no 'train'"),
        ("[]", "TypeError: list indices must be integers or slices, not str"),
        ('{"train": {"stepz": 3}}', "configuration: no field named stepz; the fields are .*"),
    ],
)
def test_the_configuration_of_a_run_is_checked(tmp_path, content, reason):
    folders = write_runs(tmp_path)
    (folders[1] / "config.json").write_text(content)
    with pytest.raises(
        UserError,
        match=rf"^cannot read {folders[1] / 'config.json'}: {reason}; delete the folder to run it again$",
    ):
        read_sizes(folders)


def test_a_run_whose_length_was_changed_is_refused(tmp_path):
    folders = write_runs(tmp_path)
    config = json.loads((folders[1] / "config.json").read_text())
    (folders[1] / "config.json").write_text(json.dumps({**config, "changes": [{"at_step": 5, "steps": 10}]}))
    with pytest.raises(
        UserError, match=rf"^the number of steps of the run in {folders[1]} was changed after it had"
    ):
        read_sizes(folders)


def single_arms(out: Path) -> tuple[list[Path], list[Path]]:
    """Write two comparisons of every size, one of each arm."""
    uniform, half = (write_comparisons(out / name[6:], {name: shifted(2)[name]}) for name in NAMES)
    return uniform, half


def test_comparisons_of_one_size_are_merged(tmp_path):
    uniform, half = single_arms(tmp_path)
    edit(half[0], seed=7, eval_every=0, log_every=1, report_to="none", preset="mine")
    edit_arm(half[1], "adamw:half", base_lr=1e-3, warmup_fraction=0.1)
    edit(half[2], data={"data": "/the/same/text"})
    sizes, arms = read_sizes([*uniform, *half])
    assert arms == list(NAMES)
    assert [size.folders for size in sizes] == [[str(one), str(other)] for one, other in zip(uniform, half)]
    assert [size.settings["adamw:half"] for size in sizes[:2]] == [
        "base LR 0.002, warm-up 60%", "base LR 0.001, warm-up 10%",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"steps": 3000}, r"steps \(60 and 3000\)"),
        ({"batch_size": 4, "eval_tokens": 0}, r"batch_size \(16 and 4\), eval_tokens \(49152 and 0\)"),
        ({"optim": {"weight_decay": 0.3}}, r"optim.weight_decay \(0.1 and 0.3\)"),
        ({"optim": {"on_nonfinite": "skip"}}, r"optim.on_nonfinite \(stop and skip\)"),
    ],
)
def test_comparisons_of_one_size_need_the_same_settings(tmp_path, changes, differing):
    uniform, half = single_arms(tmp_path)
    edit(half[2], **changes)
    with pytest.raises(
        UserError,
        match=f"^{uniform[2]} and {half[2]} hold runs of the same model and differ in {differing}, so their losses do "
        "not compare: leave one of the folders out, or train both with the same settings$",
    ):
        read_sizes([*uniform, *half])


def test_comparisons_of_one_size_need_the_same_text(tmp_path):
    uniform, half = single_arms(tmp_path)
    path = half[1] / "compare.json"
    content = json.loads(path.read_text())
    for data, differing in (
        ({"content_sha256": "b"}, r"text \(a and b\)"),
        ({"content_sha256": "b", "tokenizer_sha256": None}, r"text \(a and b\)"),
        (None, r"data.data \(sotu and mine\)"),  # a comparison without hashes
    ):
        content["data"] = data
        content["config"]["data"]["data"] = "mine"
        path.write_text(json.dumps(content))
        with pytest.raises(
            UserError, match=f"^{uniform[1]} and {half[1]} hold .* differ in {differing}, so their"
        ):
            read_sizes([*uniform, *half])


def test_comparisons_of_one_arm_need_the_same_settings_of_the_arm(tmp_path):
    folders = write_comparisons(tmp_path / "a", shifted(2), seeds=2)
    again = write_comparisons(tmp_path / "b", shifted(2), seeds=2)
    for folder in again:
        for arm in NAMES:
            edit_arm(folder, arm, seeds=[{"seed": 2, "terminal_val_loss": 4.0}])
    sizes, _ = read_sizes([*folders, *again])
    assert list(sizes[0].losses["adamw:half"]) == [0, 1, 2]
    for changes, differing in (
        ({"base_lr": 4e-3}, r"optim.base_lr \(0.002 and 0.004\)"),
        ({"base_lr": 2e-3, "ratios": "paper"}, r"optim.ratios \(half and paper\)"),
    ):
        edit_arm(again[0], "adamw:half", **changes)
        with pytest.raises(
            UserError,
            match=f"^{folders[0]} and {again[0]} hold runs of adamw:half of the same model and differ in {differing}",
        ):
            read_sizes([*folders, *again])


def test_runs_of_one_size_need_the_same_settings(tmp_path):
    uniform = write_runs(tmp_path / "uniform", optim={"ratios": "uniform"})
    others = {
        "lion": {"optim": {"optimizer": "lion", "ratios": "half", "beta2": 0.9, "weight_decay": 1.0}},
        "missing": {"optim": {"optimizer": "no_such_package:Optimizer", "ratios": "half"}},
        "seed": {"seed": 1, "optim": {"ratios": "uniform"}},
    }
    written = [
        folder for name, changes in others.items() for folder in write_runs(tmp_path / name, **changes)
    ]
    sizes, _ = read_sizes([*uniform, *written[:8]])
    assert list(sizes[0].losses) == ["adamw:uniform", "lion:half", "no_such_package:Optimizer:half"]
    sizes, _ = read_sizes([*uniform, *written], ["adamw:uniform", "lion:half"])
    assert list(sizes[0].losses["adamw:uniform"]) == [0, 1]
    longer = write_runs(tmp_path / "longer", steps=300, optim={"ratios": "half"})
    with pytest.raises(
        UserError, match=rf"^{uniform[0]} and {longer[0]} hold .* differ in steps \(60 and 300\)"
    ):
        read_sizes([*uniform, *longer])


def non_embedding(shape: Any) -> int:
    """The parameters of an untied model outside embeddings and output head."""
    return count_parameters(shape) - 2 * shape.vocab_size * shape.hidden_size


def test_sizes_are_in_the_order_of_the_counted_parameters(tmp_path):
    models = {
        "deep": replace(model(32), layers=2),
        "flat": replace(model(64), ffn_size=8),
        "deepest": replace(model(64), layers=3),
        "flattest": replace(model(192), ffn_size=8),
    }
    totals = [count_parameters(shape) for shape in models.values()]
    counts = [non_embedding(shape) for shape in models.values()]
    assert totals == sorted(totals)
    assert np.argsort(counts).tolist() == [1, 0, 3, 2]
    laws = shifted(1.25)
    folders = write_comparisons(tmp_path / "read", laws, models=models, counted=non_embedding, tuned=False)
    content = content_of(folders, counted="non-embedding")
    counts.sort()
    assert [size["non_embedding"] for size in content["sizes"]] == counts
    assert [size["parameters"] for size in content["comparisons"][0]["sizes"]] == counts
    grid = content["curves"]["parameters"]
    assert (grid[0], grid[-1]) == pytest.approx((counts[0], counts[-1] * (counts[-1] / counts[0]) ** 0.25))
    for count, size in zip(counts, content["comparisons"][0]["sizes"]):
        assert size["factor"]["value"] == pytest.approx(1.25, rel=1e-3)
        assert size["factor"]["outside"] == (1.25 * count > counts[-1])
    smallest, largest_inside, largest = (format_count(count) for count in (counts[0], counts[-2], counts[-1]))
    assert f"nats with {smallest} and " in content["answer"][0]
    assert f"with {largest} parameters." in content["answer"][0]
    assert f"For the loss of adamw:half with {largest_inside} parameters" in content["answer"][-1]
    warnings = " ".join(content["warnings"])
    assert f"The sizes span a factor of {counts[-1] / counts[0]:.3g}." in warnings
    assert f"was not tuned, or is at the edge of its grid, for adamw:uniform ({smallest})" in warnings


def test_two_sizes_with_one_count_are_refused(tmp_path):
    def shape(width: int, **changes: Any) -> Any:
        return replace(model(width), vocab_size=384, **changes)

    def refusal(one: str, other: str, counted: Any) -> str:
        with pytest.raises(UserError) as error:
            content_of([by_name[one], by_name[other], *folders], counted=counted)
        return str(error.value)

    four = {str(width): shape(width) for width in (8, 16, 24, 64)}
    others = {
        "plain": shape(32),
        "tied": shape(32, tied=True),
        "wide": shape(32, tied=True, ffn_size=256),
        "heads": shape(32, heads=2),
    }
    folders = write_comparisons(tmp_path / "four", shifted(2), models=four)
    by_name = dict(zip(others, write_comparisons(tmp_path / "others", shifted(2), models=others)))
    count = count_parameters(others["plain"])
    assert count_parameters(others["wide"]) == count
    assert refusal("plain", "wide", "all") == (
        f"the different models in {by_name['plain']} and {by_name['wide']} both have {count:,} parameters, and a size "
        "needs one model: leave one of them out, or give --parameters non-embedding"
    )
    assert (
        len(content_of([by_name["plain"], by_name["wide"], *folders], counted="non-embedding")["sizes"]) == 6
    )
    assert refusal("plain", "tied", "non-embedding") == (
        f"the different models in {by_name['tied']} and {by_name['plain']} both have "
        f"{non_embedding(others['plain']):,} parameters outside embeddings and output head, and a size needs one "
        "model: leave one of them out, or give --parameters all"
    )
    assert len(content_of([by_name["plain"], by_name["tied"], *folders])["sizes"]) == 6
    assert refusal("plain", "heads", "all").endswith("a size needs one model: leave one of them out")
    with pytest.raises(UserError, match="a size needs one model"):
        fit_sizes([by_name["plain"], by_name["heads"], *folders], tmp_path / "out", command="")
    assert not (tmp_path / "out").exists()


def test_the_report_of_another_command_is_not_replaced(tmp_path):
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"holds the report of compare \(compare.json\), and scaling would replace"
    ):
        fit_sizes([tmp_path], tmp_path, command="")
    assert [path.name for path in tmp_path.iterdir()] == ["compare.json"]


def test_a_diverged_arm_can_be_left_out(tmp_path):
    laws = {**shifted(2), "adamw:paper": (3.0, 20.0, 0.3)}
    folders = write_comparisons(tmp_path, laws)
    path = folders[0] / "compare.json"
    changed = json.loads(path.read_text())
    changed["arms"]["adamw:paper"]["seeds"][1]["terminal_val_loss"] = None
    path.write_text(json.dumps(changed))
    with pytest.raises(
        UserError,
        match="^adamw:paper diverged with seed 1 in .*: leave the arm out with --arms, or the folder$",
    ):
        read_sizes(folders)
    sizes, arms = read_sizes(folders, NAMES[::-1])
    assert arms == list(NAMES[::-1])
    assert len(sizes) == 4


def test_the_content_of_a_real_comparison_is_read(tuned_comparison, tmp_path):
    _, content = tuned_comparison
    for width in WIDTHS:
        changed = json.loads(json.dumps(content))
        changed["config"] = replace(BASE, model=model(width)).to_dict()
        (tmp_path / str(width)).mkdir()
        (tmp_path / str(width) / "compare.json").write_text(json.dumps(changed))
    sizes, arms = read_sizes([tmp_path / str(width) for width in WIDTHS])
    assert arms == ["uniform", "paper", "quickstart"]
    for size in sizes:
        for arm in arms:
            runs = content["arms"][arm]["seeds"]
            assert size.losses[arm] == {run["seed"]: run["terminal_val_loss"] for run in runs}


def test_numbers_are_short():
    assert [format_count(n) for n in (512, 999_600, 148_520, 1_836_160, 7e10)] == [
        "512", "1M", "149K", "1.84M", "70B",
    ]  # fmt: skip
    assert [format_number(n) for n in (None, 0.0123, 123.4, 2.34e7)] == ["∞", "0.0123", "123", "2.34e7"]


@pytest.mark.slow
def test_real_runs_of_four_sizes(text, cache, tmp_path, capsys):
    from blockwise_lr.train.run import train

    data = replace(BASE.data, data=str(text), cache=str(cache))
    folders = []
    for width in (8, 16, 24, 32):
        for ratios in ("uniform", "half"):
            optim = replace(BASE.optim, ratios=ratios, base_lr=4e-3)
            shape = replace(model(width), vocab_size=300)
            config = replace(
                BASE, preset="tiny", model=shape, data=data, optim=optim, steps=12, batch_size=2, eval_tokens=128,
                eval_every=0, log_every=4, device="cpu", report_to="none",
            )  # fmt: skip
            folders.append(tmp_path / f"{ratios}-{width}")
            train(config, folders[-1])
    code, out, err = call(
        capsys, "scaling", *folders, "--out", tmp_path / "out", "--parameters", "non-embedding"
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"Report: {tmp_path / 'out' / 'report.html'}"
    content = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert content["arms"] == ["adamw:uniform", "adamw:half"]
    for size in content["sizes"]:
        for arm, found in size["arms"].items():
            folder = next(each for each in size["folders"] if arm.partition(":")[2] in each)
            result = json.loads((Path(folder) / "result.json").read_text())
            assert found["losses"] == {"0": result["terminal_val_loss"]}
            assert found["tuned"] is None
    code, out, err = call(capsys, "scaling", *folders[:6], "--out", tmp_path / "out")
    assert code == 2
    assert err.startswith("blockwise-lr: a fit over sizes needs at least 4 sizes; got 3 (")
