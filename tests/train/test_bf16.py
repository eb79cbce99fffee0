"""The precision of a run: bf16 where the device has instructions for it, fp32 where it would only be emulated."""

from __future__ import annotations

import os
import platform
from dataclasses import replace

import pytest
import torch

from blockwise_lr.train.checks import check_config
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.run import train
from blockwise_lr.train.run_folder import read_run_config
from blockwise_lr.train.settings import resolve_precision


@pytest.mark.parametrize(
    ("machine", "onednn", "avx512_bf16", "amx", "precision"),
    [
        ("x86_64", False, False, False, "fp32"),  # AVX2 alone
        ("x86_64", True, False, False, "fp32"),  # AVX-512, with which oneDNN emulates bf16
        ("x86_64", True, True, False, "bf16"),
        ("AMD64", True, False, True, "bf16"),
        ("aarch64", True, False, False, "bf16"),
        ("aarch64", False, False, False, "fp32"),
    ],
)
def test_auto_is_bf16_only_where_the_cpu_computes_it(
    machine, onednn, avx512_bf16, amx, precision, monkeypatch
):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_precision("auto", "cpu") == precision
    for asked in ("bf16", "fp32"):
        assert resolve_precision(asked, "cpu") == asked


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bf16_only_where_the_gpu_computes_it(native, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native
    )
    assert resolve_precision("auto", "cuda") == ("bf16" if native else "fp32")


def test_a_run_records_the_precision_that_it_trains_in(tiny, tmp_path):
    assert TrainConfig().precision == "auto"
    tiny = replace(tiny, steps=2, log_every=1, eval_every=0, save_every=0, precision="auto")
    train(tiny, tmp_path / "run")
    recorded = read_run_config(tmp_path / "run").precision
    assert recorded == check_config(tiny).precision
    assert recorded in ("bf16", "fp32")


def test_the_mixed_precision_of_accelerate_launch_changes_nothing(tiny, tmp_path, monkeypatch, capsys):
    tiny = replace(tiny, precision="fp32")
    alone = train(tiny, tmp_path / "alone")
    assert "mixed precision" not in capsys.readouterr().err
    for asked in ("bf16", "fp16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        launched = train(tiny, tmp_path / asked)
        assert {**launched, "seconds": 0} == {**alone, "seconds": 0}
        assert (
            f"accelerate's mixed precision, {asked}, has no effect: this run trains in fp32"
            in capsys.readouterr().err
        )
        assert os.environ["ACCELERATE_MIXED_PRECISION"] == asked
