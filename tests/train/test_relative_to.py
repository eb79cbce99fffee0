"""A run with ratios over the initial scale: its learning rates, its files and its resume."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from blockwise_lr import MEASURED_RATIOS, Block
from blockwise_lr.analysis.measure_slopes import load_optimizer
from blockwise_lr.blocks import split_fused
from blockwise_lr.compare.plan import run_folder
from blockwise_lr.errors import UserError
from blockwise_lr.optim import REFERENCE_SCALES
from blockwise_lr.optim.curves import block_lr
from blockwise_lr.optim.initial_scales import scale_factor
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.initial_rms import initial_scales_of
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.run import train
from blockwise_lr.train.run_optimizer import groups_of_run
from blockwise_lr.train.settings import OptimSettings


def related(config, **changes):
    return replace(config, optim=replace(config.optim, ratios="measured", relative_to="init", **changes))


def test_a_run_logs_the_rates_of_its_blocks_scales_and_resumes(tiny_gpt2, tmp_path):
    config = replace(related(tiny_gpt2), steps=8)
    out = tmp_path / "run"
    train(config, out)
    scales = initial_scales_of(config.model)
    assert scales[Block.FFN] < 0.02 == scales[Block.EMB]  # GPT-2's output projections start smaller
    about = json.loads((out / "config.json").read_text())
    assert about["initial_rms"] == {block.value: rms for block, rms in scales.items()}
    rows = read_metrics(out / "metrics.jsonl")
    base = config.optim.base_lr
    for row in rows:
        for block, lr in row["lr"].items():
            factor, ratio = scale_factor(Block(block), scales), MEASURED_RATIOS.get(Block(block), 1.0)
            assert lr == pytest.approx(
                factor
                * block_lr(
                    row["step"] - 1, peak=ratio * base, ratio=ratio, shape="cosine", warmup_steps=1,
                    total_steps=8, floor=base / 20,
                )
            )  # fmt: skip
    with pytest.raises(UserError, match="optim.relative_to is 'init' there and None here"):
        train(replace(config, optim=replace(config.optim, relative_to="lr")), out)
    # The groups of a trained model have the scales at start.
    model = split_fused(build_model(config.model, seed=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    optimizer = load_optimizer(config, model, out / "checkpoint-8")
    assert {g["block"]: g["init_rms"] for g in optimizer.param_groups} == about["initial_rms"]


def test_a_llama_has_exactly_the_groups_of_no_reference(tiny):
    model = build_model(tiny.model, seed=0)
    plain, own = (
        groups_of_run(config.optim, OptimSettings.of(config), model)
        for config in (replace(tiny, optim=replace(tiny.optim, ratios="measured")), related(tiny))
    )
    assert [g["lr"] for g in plain] == [g["lr"] for g in own]
    assert [g["weight_decay"] for g in plain] == [g["weight_decay"] for g in own]
    assert {g["block"]: g["init_rms"] for g in own} == {
        block.value: REFERENCE_SCALES[block] for block in initial_scales_of(tiny.model)
    }


def test_folders_of_earlier_runs_keep_their_names(tiny):
    assert run_folder(tiny) == run_folder(replace(tiny, optim=replace(tiny.optim, relative_to="lr")))
    assert run_folder(tiny) != run_folder(replace(tiny, optim=replace(tiny.optim, relative_to="init")))
