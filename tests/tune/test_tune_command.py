"""`blockwise-lr tune` from end to end."""

import json
from dataclasses import replace

import pytest

from blockwise_lr.train.ratio_text import parse_ratios
from blockwise_lr.tune.early_end import EarlyEnd
from blockwise_lr.tune.proxy import describe_size
from blockwise_lr.tune.search_plan import SearchPlan
from blockwise_lr.tune.trial_worker import run_trial
from blockwise_lr.tune.tuning import describe_plan, estimate
from support.commands import run_command


def test_the_plan_names_the_proxy_the_phases_and_the_rule(tiny):
    lines = "\n".join(describe_plan(SearchPlan(tiny, trials=40, proxy="8x1"), workers=2))
    assert "proxy: llama 8x1 (for 16x2), " in lines
    assert "trials: 40 runs of 24 steps, 2 at a time" in lines
    assert "first, 8 runs tune one learning rate for all blocks" in lines
    assert "then, 32 search the ratios of EMB, QK, VO, NORM, HEAD (trust-region)" in lines
    assert "(tpe)" in "".join(describe_plan(SearchPlan(tiny, trials=20, sampler="tpe"), workers=1))
    assert "a run that is 0.4 nats behind after 60% of its steps ends" in lines
    assert "every run goes to its end" in "".join(describe_plan(SearchPlan(tiny, early_end=None), workers=1))


def test_the_estimate_counts_runs_and_measures_a_step(tiny):
    text = estimate(SearchPlan(tiny), 10, workers=2)
    assert text.startswith("estimate: about ")
    assert "for 10 runs (" in text


def test_a_tied_model_has_no_head_to_search(tiny_gpt2):
    plan = SearchPlan(tiny_gpt2)
    assert set(plan.space(plan.blocks()).blocks) == {"emb", "qk", "vo", "norm", "pos"}


def test_the_search_begins_at_four_times_the_rate_of_measured(tiny):
    measured = replace(tiny, optim=replace(tiny.optim, ratios="measured"))
    assert SearchPlan(tiny).first_rate == 1e-2
    assert SearchPlan(measured).first_rate == 4e-2


@pytest.mark.slow
def test_a_lost_trial_ends_early_and_another_goes_to_its_end(tiny, tmp_path):
    plan = SearchPlan(tiny)
    config = plan.config(plan.uniform_start()[0])
    rule = EarlyEnd(share=0.5, margin=0.1, rows=2)
    task = {
        "config": config.to_dict(),
        "folder": str(tmp_path / "whole"),
        "best": [],
        "early_end": {"share": 0.5, "margin": 0.1, "rows": 2},
    }
    whole = run_trial(task)
    assert whole["status"] == "finished"
    assert not list((tmp_path / "whole").glob("checkpoint-*"))
    lower = [[step, loss - 1.0] for step, loss in whole["curve"]]
    lost = run_trial({**task, "folder": str(tmp_path / "lost"), "best": lower})
    assert (lost["status"], lost["step"]) == ("ended", 12)
    assert lost["gap"] == pytest.approx(1.0)
    assert rule.lost(dict(lost["curve"]), dict(lower), 24)
    same = run_trial({**task, "folder": str(tmp_path / "same"), "best": whole["curve"]})
    assert (same["tune_loss"], same["curve"]) == (whole["tune_loss"], whole["curve"])


@pytest.mark.slow
def test_a_tiny_model_is_tuned_from_the_command_line_and_the_result_trains(tiny, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(tiny.to_dict()))
    arguments = (
        "tune",
        tmp_path / "tiny.json",
        "--trials",
        "5",
        "--repeats",
        "2",
        "--workers",
        "2",
        "--proxy",
        "8x1",
    )
    done = run_command(*arguments, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert content["proxy"]["size"] == "8x1"
    assert content["proxy"]["stands_for"] == describe_size(tiny.model)
    assert len(content["trials"]) >= 5
    assert set(parse_ratios(str(tmp_path / "out" / "ratios.json"))) == {
        "emb",
        "qk",
        "vo",
        "ffn",
        "norm",
        "head",
    }
    command = content["paste"]["command"].split()
    assert command[:2] == ["blockwise-lr", "train"]
    trained = run_command(*command[1:], "--steps", "4", "--out", tmp_path / "run")
    assert trained.returncode == 0, trained.stderr
    again = run_command(*arguments, "--out", tmp_path / "out")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "out" / "tune.json").read_text()) == content
