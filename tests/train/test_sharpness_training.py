"""`train --sharpness-every`: what is measured, and that it changes nothing."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blockwise_lr import measure_sharpness, split_fused
from blockwise_lr.compare.plan import run_folder
from blockwise_lr.data.prepare import prepare_data
from blockwise_lr.errors import NonFiniteLossError, UserError
from blockwise_lr.sharpness.monitor import read_reports
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import config_from_dict, identity
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.presets import get_preset, tuned_settings
from blockwise_lr.train.run import train
from blockwise_lr.train.run_sharpness import measure_batches
from support.commands import run_command, start_command

ALL = ("fisher", "hutchinson", "empirical", "optimizer")


def losses(out):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(out / "metrics.jsonl")]


def lines(out):
    """Every report of the run, by step and estimator; no two of the same."""
    reports = read_reports(out / "sharpness.jsonl")
    found = {(report.step, report.estimator): report.to_dict() for report in reports}
    assert len(found) == len(reports)
    return found


def measured(config, **changes):
    settings = {"sharpness_every": 6, "sharpness_at": (1,), "sharpness_estimators": ALL, **changes}
    return replace(config, **settings)


def test_measuring_changes_no_logged_number_of_the_run(tiny_gpt2, tmp_path):
    alone = train(tiny_gpt2, tmp_path / "alone")
    watched = train(measured(tiny_gpt2), tmp_path / "watched")
    assert losses(tmp_path / "watched") == losses(tmp_path / "alone")
    assert {**watched, "seconds": 0} == {**alone, "seconds": 0}
    assert set(lines(tmp_path / "watched")) == {
        *((step, estimator) for step in (0, 1, 6, 12, 18, 24) for estimator in ("fisher", "hutchinson")),
        *((step, "optimizer") for step in (1, 6, 12, 18, 24)),  # Adam has seen nothing before
        *((step, "empirical") for step in (0, 1, 6, 12, 18)),  # there is no gradient after the last step
    }


def test_it_is_measured_on_the_measure_split_under_the_precision_of_training(tiny, tmp_path):
    config = measured(tiny, sharpness_batches=3, steps=2, sharpness_at=(0,), sharpness_every=0)
    data = prepare_data(tiny.data, vocab_size=300, context=16)
    batches = measure_batches(data.measure, 16, batches=3, batch_size=4)
    for precision in ("fp32", "bf16"):
        train(replace(config, precision=precision), tmp_path / precision)
        found = lines(tmp_path / precision)
        model = split_fused(build_model(tiny.model, seed=0))
        model.config.use_cache = False
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            for estimator in ("fisher", "hutchinson"):
                expected = measure_sharpness(model, batches, estimator=estimator, step=0).to_dict()
                assert found[0, estimator]["blocks"] == expected["blocks"]
        assert found[0, "fisher"]["batches"] == 3
        assert found[0, "fisher"]["samples"] == 3 * 4 * 15
        assert found[0, "empirical"]["samples"] == 4 * 15
    assert lines(tmp_path / "bf16")[0, "fisher"] != lines(tmp_path / "fp32")[0, "fisher"]


def test_measure_windows_are_spread_over_the_split_and_none_is_taken_twice(tiny):
    data = prepare_data(tiny.data, vocab_size=300, context=16)
    batches = measure_batches(data.measure, 16, batches=5, batch_size=3)
    assert [batch["input_ids"].shape for batch in batches] == [(3, 16)] * 5
    tokens = data.measure.read(0, data.measure.n_tokens).tolist()
    windows = [tuple(tokens[i : i + 16]) for i in range(0, len(tokens) - 15, 16)]
    places = [[windows.index(tuple(row.tolist())) for row in batch["input_ids"]] for batch in batches]
    assert len({place for batch in places for place in batch}) == 15
    for batch in places:  # each spans the split
        assert max(batch) - min(batch) > len(windows) / 2


def test_an_interrupted_and_resumed_run_leaves_the_same_lines(tiny_gpt2, tmp_path):
    config = measured(tiny_gpt2, sharpness_every=5)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config, whole)
    train(config, cut)
    # As if killed while a line after step 20, the newest complete checkpoint, was written.
    (cut / "result.json").unlink()
    (cut / "checkpoint-24" / "manifest.json").unlink()
    path = cut / "sharpness.jsonl"
    path.write_bytes(path.read_bytes()[:-1000])
    train(config, cut)
    assert lines(cut) == lines(whole)
    assert losses(cut) == losses(whole)


@pytest.mark.slow
def test_a_killed_run_leaves_the_same_lines_when_it_has_resumed(tiny, tmp_path):
    config = measured(tiny, steps=40, save_every=6, sharpness_estimators=("fisher", "empirical"))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config, whole)
    process = start_command("train", tmp_path / "config.json", "--out", cut)
    while process.poll() is None and (
        not (rows := read_metrics(cut / "metrics.jsonl")) or rows[-1]["step"] < 20
    ):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (cut / "result.json").exists(), "finished before it could be killed"
    assert 0 < len(lines(cut)) < len(lines(whole))
    train(config, cut)
    assert lines(cut) == lines(whole)


def test_two_processes_measure_what_one_measures(tiny_gpt2, tmp_path):
    one = measured(
        tiny_gpt2, precision="fp32", steps=6, optim=replace(tiny_gpt2.optim, base_lr=1e-4), sharpness_every=3
    )
    train(one, tmp_path / "one")
    (tmp_path / "two.json").write_text(json.dumps(replace(one, batch_size=2).to_dict()))
    done = run_command("train", tmp_path / "two.json", "--out", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, together = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert set(alone) == set(together)
    for key, report in alone.items():
        assert together[key]["samples"] == report["samples"]
        for block, (mean, _, numel) in report["blocks"].items():
            found = together[key]["blocks"][block]
            assert found[2] == numel
            assert found[0] == pytest.approx(mean, rel=1e-3, abs=1e-9), (key, block)


def test_a_compared_run_is_the_same_run_with_or_without_measurements(tiny):
    watched = measured(tiny, sharpness_batches=2)
    assert identity(watched) == identity(tiny)
    assert run_folder(watched) == run_folder(tiny)
    quickstart = get_preset("quickstart")
    assert tuned_settings(measured(quickstart)) == tuned_settings(quickstart) is not None


def test_the_settings_survive_json(tiny):
    config = measured(tiny)
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["sharpness_at"] == [1]


def test_a_finished_run_that_was_not_measured_says_how_to_measure_it(tiny, tmp_path, capsys):
    config = replace(tiny, steps=4)
    train(config, tmp_path / "run")
    train(measured(config), tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    assert f"its sharpness was not measured: blockwise-lr sharpness {tmp_path / 'run'} measures" in said


@pytest.mark.filterwarnings("ignore:step .* sharpness was not measured")
def test_a_run_that_diverges_while_it_is_measured_ends_as_any_other(tiny, tmp_path):
    wild = replace(tiny, optim=replace(tiny.optim, base_lr=1e30, weight_decay=0.0), sharpness_every=1)
    with pytest.raises(NonFiniteLossError, match="the (loss|gradient) was no longer finite at step"):
        train(wild, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["diverged"]
    assert (0, "fisher") in lines(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sharpness_every": -1}, "--sharpness-every is -1; expected 0 or more"),
        ({"sharpness_at": [25]}, "--sharpness-at names step 25; expected 0 to 24, the run's steps"),
        ({"sharpness_at": [-1]}, "--sharpness-at names step -1; expected 0 to 24"),
        ({"sharpness_at": 3}, "sharpness_at is 3; expected a list of int"),
        ({"sharpness_every": 1, "sharpness_batches": 0}, "--sharpness-batches is 0; expected 1 or more"),
        (
            {"sharpness_every": 1, "sharpness_batches": 100},
            "100 batches of 4 windows to measure sharpness on are 400, but the split measure of .* holds "
            r"\d+ windows of 16 tokens: measure on fewer batches, or give more text",
        ),
        (
            {"sharpness_estimators": ["fish"]},
            r"sharpness_estimators is \['fish'\]; expected a list of 'fisher' or 'empirical'",
        ),
        ({"sharpness_estimators": ["fisher", "fisher"]}, "is fisher fisher; expected one or more, each once"),
        (
            {"sharpness_every": 1, "sharpness_estimators": []},
            "--sharpness-estimators is empty; expected one or more, each once",
        ),
    ],
)
def test_a_setting_out_of_range(tiny, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train(config_from_dict({**tiny.to_dict(), **changes}), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not Path(tmp_path / "run" / "config.json").exists()


def test_numbers_that_are_not_finite_are_null_in_the_file(tiny, tmp_path):
    train(measured(replace(tiny, steps=2), sharpness_estimators=("empirical",)), tmp_path / "run")
    row = json.loads((tmp_path / "run" / "sharpness.jsonl").read_text().splitlines()[0])
    assert row["blocks"]["qk"][1] is None  # one draw has no standard error
    assert math.isnan(read_reports(tmp_path / "run" / "sharpness.jsonl")[0]["qk"].stderr)
