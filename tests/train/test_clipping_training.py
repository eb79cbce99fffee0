"""`train --clip-by-block` and `--weight-decay-by-block`: in config and metrics, kept on resume, on two processes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from blockwise_lr.errors import NonFiniteLossError, UserError
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.checks import check_config
from blockwise_lr.train.config import TrainConfig, identity
from blockwise_lr.train.metrics import MetricsFile, read_metrics
from blockwise_lr.train.run import train
from blockwise_lr.train.run_optimizer import groups_of_run
from blockwise_lr.train.settings import OptimSettings
from support.commands import run_command

CLIP = {"clip_by_block": "emb=0.005,ffn=0.02", "weight_decay_by_block": "norm=0,emb=.3"}


def of(config, **optim):
    return replace(config, optim=replace(config.optim, **(optim or CLIP)))


def rows(folder):
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def test_the_norms_are_logged_and_the_settings_are_in_the_runs_files(tiny, tmp_path):
    train(of(tiny), tmp_path / "run")
    found = rows(tmp_path / "run")
    for row in found:
        assert set(row["grad_norms"]) == {"norm", "emb", "qk", "vo", "ffn", "head"}
        assert row["grad_norm"] == pytest.approx(math.hypot(*row["grad_norms"].values()), rel=1e-5)
    for block, limit in {"emb": 0.005, "ffn": 0.02}.items():  # before clipping
        assert max(row["grad_norms"][block] for row in found) > 1.2 * limit
    optim = json.loads((tmp_path / "run" / "config.json").read_text())["train"]["optim"]
    assert optim["clip_by_block"] == "emb=0.005,ffn=0.02"
    assert optim["weight_decay_by_block"] == "emb=0.3,norm=0"
    saved = torch.load(tmp_path / "run" / "checkpoint-24" / "optimizer.pt", weights_only=True)
    assert {g["block"]: g["weight_decay"] for g in saved["param_groups"]} == {
        "norm": 0.0, "emb": 0.3, "qk": 0.1, "vo": 0.1, "ffn": 0.1, "head": 0.1,
    }  # fmt: skip


def test_limits_that_nothing_reaches_train_as_without_any_whatever_clip_says(tiny, tmp_path):
    train(of(tiny, clip=0.0), tmp_path / "free")
    train(of(tiny, clip=0.01, clip_by_block="1e6"), tmp_path / "high")
    train(of(tiny, clip=0.0, clip_by_block="0.02"), tmp_path / "low")
    free, high, low = ([row["train_loss"] for row in rows(tmp_path / run)] for run in ("free", "high", "low"))
    assert high == free
    assert low != free


def test_a_run_that_is_cut_goes_on_to_the_bit_and_the_same_limits_are_the_same_run(tiny_gpt2, tmp_path):
    train(of(tiny_gpt2), tmp_path / "run")
    whole = rows(tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-20":
            (checkpoint / "manifest.json").unlink()
    otherwise = of(tiny_gpt2, clip_by_block="ffn=2e-2, emb=0.005", weight_decay_by_block="emb=0.30,norm=0")
    train(otherwise, tmp_path / "run")
    assert rows(tmp_path / "run") == whole
    with pytest.raises(UserError, match="clip_by_block"):
        train(of(tiny_gpt2, **{**CLIP, "clip_by_block": "emb=0.005"}), tmp_path / "run")


def test_two_processes_clip_as_one(tiny, tmp_path):
    one = of(replace(tiny, precision="fp32", steps=8), **CLIP, base_lr=1e-3)
    train(one, tmp_path / "one")
    (tmp_path / "two.json").write_text(json.dumps(replace(one, batch_size=2).to_dict()))
    done = run_command("train", tmp_path / "two.json", "--out", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert b["grad_norms"] == pytest.approx(a["grad_norms"], rel=1e-3)
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-4)


def test_a_run_that_diverges_names_the_gradients(tiny, tmp_path):
    wild = of(
        replace(tiny, precision="fp32"), base_lr=1e30, warmup_steps=0, weight_decay=0.0, clip_by_block="1"
    )
    with pytest.raises(NonFiniteLossError, match=r"gradients that are not finite: norm: all 5 parameters"):
        train(wild, tmp_path / "run")


def test_numbers_in_a_row_that_are_not_finite_are_null_at_any_depth(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    row = {"step": 1, "seconds": 1.0, "train_loss": 3.0}
    metrics.append({**row, "grad_norm": math.inf, "grad_norms": {"emb": math.nan, "qk": 1.0}})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {**row, "grad_norm": None, "grad_norms": {"emb": None, "qk": 1.0}}
    ]


def test_runs_from_before_these_settings_are_the_same_runs():
    fields = identity(TrainConfig())
    assert not any("by_block" in name for name in fields)
    assert "optim.clip_by_block" in identity(of(TrainConfig()))


def test_the_flags_give_these_settings(tiny, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(replace(tiny, steps=2).to_dict()))
    done = run_command(
        "train", tmp_path / "tiny.json", "--out", tmp_path / "run",
        "--clip-by-block", "0.5", "--weight-decay-by-block", "ffn=0.2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    optim = json.loads((tmp_path / "run" / "config.json").read_text())["train"]["optim"]
    assert (optim["clip_by_block"], optim["weight_decay_by_block"]) == ("0.5", "ffn=0.2")
    assert len(rows(tmp_path / "run")[-1]["grad_norms"]) == 6


def test_blocks_that_are_not_named_keep_the_runs_weight_decay(tiny):
    config = check_config(of(tiny, weight_decay=0.02, weight_decay_by_block="ffn=0.2", decay="constant"))
    groups = groups_of_run(config.optim, OptimSettings.of(config), build_model(config.model, seed=0))
    for group in groups:
        expected = 0.2 if group["block"] == "ffn" else 0.02
        assert group["weight_decay"] * group["lr_ratio"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"clip_by_block": "0"}, "--clip-by-block is 0.0; expected a number above 0"),
        ({"clip_by_block": "mlp=1"}, "--clip-by-block: 'mlp' is not a block; the blocks are emb, qk"),
        ({"clip_by_block": "ffn=-1"}, "--clip-by-block: ffn is -1.0; expected a number above 0"),
        ({"clip_by_block": "ffn"}, "--clip-by-block: 'ffn' is no pair such as \"emb=4\""),
        ({"clip_by_block": "ffn=1,ffn=2"}, "--clip-by-block: ffn is there twice"),
        ({"weight_decay_by_block": "0.1"}, "--weight-decay-by-block: '0.1' is no pair such as"),
        ({"weight_decay_by_block": "mlp=1"}, "--weight-decay-by-block: 'mlp' is not a block"),
        (
            {"weight_decay_by_block": "ffn=-1"},
            "--weight-decay-by-block: ffn is -1.0; expected a finite number, 0 or above",
        ),
        (
            {"weight_decay_by_block": "ffn=x"},
            "--weight-decay-by-block: 'ffn=x': could not convert string to float",
        ),
    ],
)
def test_bad_input_gives_one_line(tiny, tmp_path, optim, message):
    with pytest.raises(UserError, match=message) as error:
        train(of(tiny, **optim), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()
