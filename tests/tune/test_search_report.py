"""The report says what the trials show, from a recorded search and from closed-form ones.

data/tune.json: 16 trials of 40 steps of a LLaMA of 17 360 parameters on this project's documentation, 2 CPU cores,
2026-11-27, by `blockwise-lr tune tiny.json --steps 40 --trials 16 --repeats 2 --workers 2 --out out3`.
"""

import copy
import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from blockwise_lr import param_groups, split_fused
from blockwise_lr.errors import UserError
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig
from blockwise_lr.train.ratio_text import parse_ratios
from blockwise_lr.train.run_optimizer import groups_of_run, optimizer_of_run
from blockwise_lr.train.settings import OptimSettings
from blockwise_lr.tune.search_findings import build_content, is_bracketed
from blockwise_lr.tune.search_report import print_summary, write_results
from blockwise_lr.tune.search_wording import answer, paste, warnings
from blockwise_lr.tune.space import Point, Space
from blockwise_lr.tune.trial_store import TrialRecord
from support.synthetic_search import PLAN, search

RECORDED = json.loads((Path(__file__).parent / "data" / "tune.json").read_text())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The folder of the recorded search's results."""
    out = tmp_path_factory.mktemp("recorded")
    write_results(RECORDED, out)
    return out


def content_of(plan, out, **changes):
    """tune.json of a closed-form search."""
    store = search(plan, out)
    facts = json.loads((out / "runs" / "0001" / "config.json").read_text())
    about = {key: facts[key] for key in ("hardware", "versions", "git_commit", "data")}
    command = f"blockwise-lr tune quickstart --trials={plan.trials} --data texts --out {out} --seed 0"
    return build_content(plan, store, out, command=command, about=about, date="2026-11-27")


@pytest.fixture(scope="module")
def closed_form(tmp_path_factory):
    """40 trials of a known valley, in which NORM is flat."""
    out = tmp_path_factory.mktemp("closed_form")
    return content_of(replace(PLAN, trials=40, repeats=3), out)


def test_every_file_is_there_and_tune_json_is_the_content(recorded):
    names = {"ratios.json", "tune.json", "report.md", "report.html", "ratios.png", "search.png", "gain.png"}
    assert {path.name for path in recorded.iterdir()} == names
    assert json.loads((recorded / "tune.json").read_text()) == RECORDED
    for name in ("ratios", "search", "gain"):
        assert (recorded / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_train_reads_the_ratios(recorded):
    best = RECORDED["trials"][RECORDED["best"]["trial"] - 1]["point"]["ratios"]
    assert parse_ratios(str(recorded / "ratios.json")) == {**best, "ffn": 1.0}


def test_both_reports_give_the_answer_the_lines_to_paste_and_every_trial(recorded):
    page, text = ((recorded / name).read_text() for name in ("report.html", "report.md"))
    for words in (
        "cannot be told apart after 40 steps",
        "gain +0.244 nats",
        "13 trials are near the best one, and the ranges of the ratios need 20",
    ):
        assert words in page
        assert words in text.replace("\\", "")
    assert RECORDED["paste"]["python"] in text
    assert RECORDED["paste"]["command"] in text
    assert page.count("<img") == 3
    assert text.count("\n| uniform |") == 3
    assert text.count("\n| ratios |") == 13
    assert text.count("\n| repeat |") == 2


def test_the_lines_to_paste_run():
    from torch import nn

    from blockwise_lr import param_groups

    model = nn.ModuleDict({"wte": nn.Embedding(16, 4), "ln_f": nn.LayerNorm(4)})
    found = {"LR": 1e-2, "model": model, "param_groups": param_groups}
    exec(RECORDED["paste"]["python"], found)
    lrs = {group["block"]: group["lr"] for group in found["groups"]}
    assert lrs["norm"] == pytest.approx(1e-2 * 0.186 * RECORDED["ratios"]["norm"], rel=1e-2)


@pytest.mark.parametrize(
    ("optim", "added"),
    [
        ({}, ""),
        ({"relative_to": "init"}, ', relative_to="init"'),
        ({"decay": "constant"}, ', decay="constant"'),
        ({"no_decay": "1d"}, ', no_decay="1d"'),
        ({"no_decay": "norm,pos"}, ', no_decay=["norm", "pos"]'),
        ({"weight_decay": 0.05}, ", weight_decay=0.05"),
        ({"optimizer": "sgd"}, ", weight_decay=0"),
        ({"weight_decay_by_block": "emb=0,ffn=0.2"}, ', weight_decay={"emb": 0, "ffn": 0.2}'),
        ({"weight_decay": 0.05, "weight_decay_by_block": "emb=0.1,norm=0"}, None),
        ({"relative_to": "init", "decay": "constant", "no_decay": "emb", "weight_decay": 0.3}, None),
    ],
)
def test_the_lines_to_paste_make_the_groups_of_the_run(closed_form, optim, added):
    model = ModelConfig(family="gpt2", hidden_size=64, layers=4, heads=2, vocab_size=256, context=64)
    base = replace(PLAN.base, model=model, optim=replace(PLAN.base.optim, **optim))
    plan = replace(PLAN, base=base, proxy="none")
    python = paste(plan, {**closed_form, "ratios": {**closed_form["ratios"], "pos": 2.0}})["python"]
    if added is not None:
        assert python.endswith(f"}}{added})")

    point = Point.from_dict(closed_form["best"]["point"])
    config = plan.config(replace(point, ratios={**point.ratios, "pos": 2.0}))
    module = split_fused(build_model(config.model, seed=0))
    kind, options = optimizer_of_run(config.optim)
    run = kind(groups_of_run(config.optim, OptimSettings.of(config), module), lr=1.0, **options)
    given = {"LR": closed_form["uniform"]["point"]["base_lr"], "model": module, "param_groups": param_groups}
    exec(python, given)
    expected = by_parameter(run.param_groups)
    found = by_parameter(given["groups"])
    assert found.keys() == expected.keys() == {name for name, _ in module.named_parameters()}
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=0.01), name


def by_parameter(groups):
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


def test_the_command_to_paste_keeps_the_run_and_drops_the_search(closed_form):
    command = closed_form["paste"]["command"]
    assert command.startswith("blockwise-lr train quickstart --data texts --ratios ")
    point = closed_form["trials"][closed_form["best"]["trial"] - 1]["point"]
    assert f"/ratios.json --base-lr {point['base_lr']:.3g} --warmup-fraction {point['warmup']:.2g}" in command
    assert "--trials" not in command
    assert "--seed" not in command


def test_names_with_markup_are_text(tmp_path):
    hostile = copy.deepcopy(RECORDED)
    hostile["preset"] = "<script>alert(1)</script>"
    hostile["command"] = "x ``` <b>bold</b>"
    write_results(hostile, tmp_path)
    page, text = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    assert "<script" not in page + text
    assert "<b>" not in page
    assert "````\nx ``` <b>bold</b>\n````" in text
    shown = StringIO()
    print_summary({**hostile, "answer": ["[red]x[/bold]"]}, tmp_path, Console(file=shown))
    assert "[red]x[/bold]" in shown.getvalue()


def test_what_is_decided_is_what_is_there(closed_form):
    """The valley: EMB and HEAD 4, QK 2, VO 1/2 at base LR 2^-7, and NORM too flat to see."""
    valleys = closed_form["valleys"]
    assert {name for name, valley in valleys.items() if valley.get("decided")} == {"emb", "qk", "vo", "head"}
    assert valleys["base_lr"]["low"] < 2**-7 < valleys["base_lr"]["high"]
    for block, ratio in (("emb", 4.0), ("head", 4.0), ("qk", 2.0), ("vo", 0.5)):
        assert valleys[block]["low"] < ratio < valleys[block]["high"]
    assert not valleys["norm"]["bounded"]
    assert "The trials do not decide the ratio of NORM: its ratio may be noise." in closed_form["answer"][2]


def test_the_gain_is_over_the_best_uniform_run_by_seed(closed_form):
    gain = closed_form["gain"]
    assert len(gain["per_seed"]) == 3
    assert gain["ci95"][0] < gain["mean"] < gain["ci95"][1]
    fresh = sum(gain["per_seed"][1:]) / 2
    assert gain["fresh_mean"] == pytest.approx(fresh)
    assert gain["mean"] > 0.15
    first = closed_form["answer"][0]
    assert first.startswith(
        f"The best ratios beat the tuned uniform learning rate by {gain['mean']:.3f} nats"
    )
    assert first.endswith(f"3 seeds; +{fresh:.3f} without the seed that chose).")
    assert closed_form["noise"] == pytest.approx(0.002, abs=0.002)  # without what a seed adds to every run
    assert [start["name"] for start in closed_form["start"]] == ["half way", "measured"]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("bracketed", "The best uniform learning rate is at the edge of those tried"),
        ("warmup_bracketed", "The best uniform warm-up is at the edge of those tried"),
    ],
)
def test_a_uniform_setting_at_the_edge_of_those_tried_is_not_called_tuned(closed_form, key, words):
    for bracketed in (True, False):
        content = {**closed_form, "uniform": {**closed_form["uniform"], key: bracketed}}
        assert any(warning.startswith(words) for warning in warnings(content)) is not bracketed


@pytest.mark.parametrize(
    ("tried", "best", "expected"),
    [
        ([0.15], 0.15, False),
        ([0.15, 0.3], 0.3, False),
        ([0.15, 0.3, 0.6], 0.3, True),
        ([0.15, 0.3, 0.6, 0.7071], 0.7071, True),  # no longer one may be tried
        ([0.7071], 0.7071, False),
        ([0.0157, 0.0313], 0.0157, True),
    ],
)
def test_a_bound_of_the_space_is_as_good_as_a_trial_beyond_it(tried, best, expected):
    trials = [TrialRecord(i, "uniform", Point(1e-3, warmup), seed=0) for i, warmup in enumerate(tried)]
    chosen = trials[tried.index(best)]
    assert is_bracketed("warmup", chosen, trials, Space([])) is expected


def test_a_uniform_rate_at_the_edge_is_searched_on_in_another_folder(closed_form):
    content = {**closed_form, "uniform": {**closed_form["uniform"], "bracketed": False}}
    (said,) = (warning for warning in warnings(content) if "learning rate is at the edge" in warning)
    assert said.endswith("give it more --trials, or another --base-lr with another --out.")


def test_fewer_trials_than_before_count_the_uniform_ones_that_were_run(tmp_path):
    search(replace(PLAN, trials=20), tmp_path)
    content = content_of(replace(PLAN, trials=5), tmp_path)
    assert content["uniform_trials"] == 4
    assert content["warnings"][-1].startswith(
        "The best of 16 trials is compared with the best of 4 uniform ones."
    )


def test_where_uniform_is_best_the_answer_says_so_and_gives_no_ratios(closed_form):
    content = {
        **closed_form,
        "best": closed_form["uniform"],
        "ratios": dict.fromkeys(closed_form["ratios"], 1.0),
    }
    first, second, _ = answer(content)
    assert first == "No ratios that were tried beat the tuned uniform learning rate after 100 steps."
    assert second.startswith("The best trial has ratio 1 for every block, and a warm-up of ")
    unknown = {**closed_form, "gain": {**closed_form["gain"], "mean": None, "reason": "a run diverged"}}
    first, second, _ = answer(unknown)
    assert first.endswith("learning rate is unknown: a run diverged.")
    assert second.startswith("The best ratios are EMB ")


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    content = content_of(replace(PLAN, repeats=1), tmp_path)
    assert content["gain"]["ci95"] is None
    assert "one seed cannot separate an effect from noise" in content["answer"][0]
    assert any("noise between seeds is not known" in warning for warning in content["warnings"])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"repeats": 1}, {"trials": 5, "proxy": "8x1"}, {"trials": 40}])
def test_the_report_of_every_kind_of_search_is_written(tmp_path, changes):
    write_results(content_of(replace(PLAN, **changes), tmp_path), tmp_path)
    assert (tmp_path / "report.html").read_text().count("<img") == 3


def test_a_proxy_is_named_with_what_it_stands_for(tmp_path):
    content = content_of(replace(PLAN, trials=5, repeats=1, proxy="8x1"), tmp_path)
    assert content["proxy"] == {
        "size": "8x1",
        "parameters": content["proxy"]["parameters"],
        "stands_for": "16x2",
    }
    assert content["warnings"][0].startswith("The trials trained a proxy, 8x1 with ")


def test_a_search_without_a_result_is_refused(tmp_path):
    from blockwise_lr.tune.trial_store import TrialStore

    with pytest.raises(
        UserError, match="the search has no finished trial yet; run the same tune command again"
    ):
        build_content(PLAN, TrialStore(tmp_path / "trials"), tmp_path, command="", about={}, date="")


def test_a_missing_seed_is_named(tmp_path):
    store = search(PLAN, tmp_path)
    with pytest.raises(UserError, match="with the seeds 2 are missing; run the same tune command again"):
        build_content(replace(PLAN, repeats=3), store, tmp_path, command="", about={}, date="")


def test_every_block_has_its_peak_learning_rate_over_its_initial_scale(closed_form, tmp_path):
    best, rms = closed_form["best"], closed_form["initial_rms"]
    assert set(rms) == set(closed_form["blocks"]) == set(best["lr_over_initial_rms"])
    lr = best["point"]["base_lr"] * closed_form["ratios"]["emb"]
    assert best["lr_over_initial_rms"]["emb"] == pytest.approx(lr / rms["emb"])
    write_results(closed_form, tmp_path)
    (row,) = (
        line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| EMB |")
    )
    assert row.endswith(f"| {lr / rms['emb']:.3g} |")


def test_ratios_that_relate_to_the_initial_scale_give_another_quotient(closed_form, tmp_path):
    optim = replace(PLAN.base.optim, relative_to="init")
    content = content_of(replace(PLAN, base=replace(PLAN.base, optim=optim), trials=8), tmp_path)
    over, ratios = content["best"]["lr_over_initial_rms"], content["ratios"]
    # Each scale cancels: relative to init, the quotients are in the proportion of the ratios, by the reference scales.
    assert over["emb"] / over["qk"] == pytest.approx(ratios["emb"] / ratios["qk"], rel=0.01)


def test_a_proxys_command_says_where_its_learning_rate_comes_from(closed_form):
    content = {**closed_form, "proxy": {"size": "64x4", "parameters": 9, "stands_for": "768x12"}}
    (said,) = (warning for warning in warnings(content) if "proxy" in warning)
    assert said.endswith(f"replace it by {content['lr_factor']:.3g} times your own tuned uniform rate.")
