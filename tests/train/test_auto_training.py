"""`train --ratios auto`: ratios in config, metrics and checkpoint, kept on resume to the bit, on two processes too."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from blockwise_lr.errors import UserError
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.run import train
from blockwise_lr.train.settings import OptimSettings
from support.commands import run_command


def auto(config, **optim):
    settings = {"ratios": "auto:gain=9,stop=0.6", "base_lr": 5e-3, **optim}
    return replace(config, optim=replace(config.optim, **settings))


def rows(folder):
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def test_ratios_move_are_logged_and_rest(tiny, tmp_path):
    train(auto(tiny), tmp_path / "run")
    found = rows(tmp_path / "run")
    assert found[-1]["ratios"]["ffn"] == 1.0
    moved = {tuple(row["ratios"].values()) for row in found}
    assert len(moved) > 5
    at_rest = [row["ratios"] for row in found if row["step"] > 0.6 * 24]
    assert all(ratios == at_rest[0] for ratios in at_rest)
    assert at_rest[0]["norm"] != at_rest[0]["vo"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["train"]["optim"]["ratios"] == "auto:gain=9,stop=0.6"
    saved = torch.load(tmp_path / "run" / "checkpoint-24" / "optimizer.pt", weights_only=True)
    kept = {group["block"]: group["lr_ratio"] for group in saved["param_groups"]}
    assert kept == pytest.approx(found[-1]["ratios"])


def test_a_run_that_is_cut_goes_on_with_its_ratios_to_the_bit(tiny_gpt2, tmp_path):
    config = auto(tiny_gpt2, re_measure=4)
    train(config, tmp_path / "run")
    whole = rows(tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-20":
            (checkpoint / "manifest.json").unlink()
    train(config, tmp_path / "run")
    assert rows(tmp_path / "run") == whole


def test_the_interval_after_the_first_half_is_a_setting_of_the_rule_or_a_flag(tiny):
    moving = [
        OptimSettings.of(auto(tiny, ratios=text, re_measure=flag)).moving
        for text, flag in (("auto:re_measure=5", 0), ("auto", 5), ("auto:re_measure=9", 5))
    ]
    assert [rule.re_measure for rule in moving] == [5, 5, 5]


def test_the_guard_watches_the_loss_after_the_ratios_rest(tiny, tmp_path, caplog):
    """A warm-up that lasts almost to the end, to a rate that is far too high, makes it rise late."""
    late = {"base_lr": 0.4, "warmup_fraction": 0.9, "warmup_steps": None}
    train(auto(tiny, ratios="auto:stop=0.1,guard=0.05", **late), tmp_path / "run")
    found = {row["step"]: row["ratios"] for row in rows(tmp_path / "run")}
    assert found[24]["norm"] < 0.9 * found[4]["norm"]
    backed_off = [r.args[0] for r in caplog.records if "ratios backed off" in r.getMessage()]
    assert max(backed_off) > 0.1 * 24


def test_two_processes_find_the_ratios_of_one(tiny, tmp_path):
    one = auto(replace(tiny, precision="fp32", steps=12), base_lr=1e-3)
    train(one, tmp_path / "one")
    (tmp_path / "two.json").write_text(json.dumps(replace(one, batch_size=2).to_dict()))
    done = run_command("train", tmp_path / "two.json", "--out", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert b["ratios"] == pytest.approx(a["ratios"], rel=1e-3)
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"ratios": "paper", "re_measure": 5}, "--re-measure is 5 with --ratios paper; expected 0"),
        ({"re_measure": -1}, "--re-measure is -1 with --ratios auto"),
        (
            {"optimizer": "nadamw"},
            "AdamW or Adam-mini; --optimizer is nadamw: give it ratios that do not move",
        ),
        ({"ratios": "auto:gian=1"}, "auto: no option 'gian'; there are begin, gain"),
    ],
)
def test_bad_input_gives_one_line(tiny, tmp_path, optim, message):
    with pytest.raises(UserError, match=message):
        train(auto(tiny, **optim), tmp_path / "run")


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_warm_up_at_an_equal_slope_never_stops_a_run_midway(tiny, tmp_path, schedule):
    slopes = {"warmup": "equal_slope", "warmup_steps": 2, "schedule": schedule}
    config = auto(tiny, ratios="auto:begin=uniform,gain=300,signal=cosine,start=0,stop=1", **slopes)
    train(config, tmp_path / "run")
    found = rows(tmp_path / "run")
    assert found[-1]["step"] == 24
    longest = 24 / 2 if schedule == "cosine" else 24 / 6
    assert max(max(row["ratios"].values()) for row in found) == pytest.approx(longest)
    with pytest.raises(UserError, match="warm-up takes 32 steps, but the run"):  # of EMB, measured 16
        train(auto(tiny, **slopes), tmp_path / "other")
