"""The theory's prediction: its formula on known norms, and its parts in fused and split models."""

import math

import pytest
import torch
from torch import nn

from blockwise_lr import Block, classify, measure_sharpness, split_fused
from blockwise_lr.sharpness.theory import predicted_by_block, predicted_sharpness
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig

GPT2 = ModelConfig("gpt2", hidden_size=8, layers=1, heads=2, vocab_size=11, context=8, tied=True)


def test_a_gain_and_a_matrix_are_one_over_size_times_squared_norm() -> None:
    model = nn.Sequential(nn.Embedding(2, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    nn.init.constant_(model[2].weight, 0.5)
    predicted = predicted_sharpness(model)
    assert predicted["1.weight"] == pytest.approx(1 / (4 * 4))
    assert predicted["2.weight"] == pytest.approx(1 / (8 * 8 * 0.25))


def test_an_embedding_goes_by_its_smallest_row() -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2), nn.Linear(2, 3))
    model[0].weight.data = torch.tensor([[3.0, 0.0], [0.0, 0.1], [1.0, 1.0]])
    assert predicted_sharpness(model)["0.weight"] == pytest.approx(1 / (6 * 0.01))


def test_biases_have_no_prediction_and_zeros_an_infinite_one() -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2), nn.Linear(2, 3))
    nn.init.zeros_(model[1].weight)
    predicted = predicted_sharpness(model)
    assert sorted(predicted) == ["0.weight", "1.weight", "2.weight"]
    assert math.isinf(predicted["1.weight"])
    split = predicted_sharpness(split_fused(build_model(GPT2, seed=0)))
    assert not [name for name in split if "bias" in name]


def test_a_fused_weight_is_predicted_by_part_whether_split_or_not() -> None:
    fused = predicted_sharpness(build_model(GPT2, seed=0))
    split = predicted_sharpness(split_fused(build_model(GPT2, seed=0)))
    parts = [fused[f"transformer.h.0.attn.c_attn.weight:{part}"] for part in "qkv"]
    originals = [split[f"transformer.h.0.attn.c_attn.parametrizations.weight.original{i}"] for i in range(3)]
    assert parts == pytest.approx(originals)


def test_a_blocks_prediction_is_the_mean_over_its_elements() -> None:
    model = build_model(GPT2, seed=0)
    ids = torch.arange(8).unsqueeze(0)
    report = measure_sharpness(model, {"input_ids": ids, "labels": ids})
    predicted = predicted_sharpness(model)
    by_block = predicted_by_block(report, predicted, classify(model))
    gains = [name for name in predicted if "ln_" in name]
    assert by_block[Block.NORM] == pytest.approx(sum(predicted[name] for name in gains) / len(gains))
    assert set(by_block) == {Block.EMB, Block.POS, Block.QK, Block.VO, Block.FFN, Block.NORM}
