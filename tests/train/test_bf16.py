"""The precision of a run: bf16 where the device has instructions for it, fp32 where it would only be emulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blockwise_lr.train.checks import check_config
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.run import train
from blockwise_lr.train.run_folder import read_run_config
from blockwise_lr.train.settings import resolve_precision


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bf16_only_where_the_cpu_computes_it(native, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    assert resolve_precision("auto", "cpu") == ("bf16" if native else "fp32")
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
