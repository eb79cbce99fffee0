"""`--compile` compiles the repeated layer once. The run, its checkpoints and its evaluations stay what they were."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from blockwise_lr import merge_fused, split_fused
from blockwise_lr.analysis.evaluate import evaluate_run
from blockwise_lr.checkpoints.manifest import checkpoints
from blockwise_lr.train import assembly
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.compiled_layers import compile_layers, repeated_layers, run_eagerly
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.run import train
from blockwise_lr.train.unmasked_attention import use_unmasked_attention


class Graphs:
    """A backend that runs every graph as it is, and counts them."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.count = 0

    def __call__(self, graph, example):
        self.count += 1
        return graph.forward


def model_of(config, layers=2):
    model = split_fused(build_model(replace(config.model, layers=layers), seed=0))
    use_unmasked_attention(model)
    return model


def gradients(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.fixture
def ids(tiny):
    return torch.randint(tiny.model.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layers", [1, 2, 12])
@pytest.mark.parametrize("family", ["tiny", "tiny_gpt2"])
def test_the_layer_and_the_loss_are_one_graph_each_whatever_the_depth(request, family, layers, ids):
    model = model_of(request.getfixturevalue(family), layers)
    plain = deepcopy(model)
    graphs = Graphs()
    assert len(compile_layers(model, backend=graphs)) == layers
    for found, expected in zip(gradients(model, ids), gradients(plain, ids), strict=True):
        torch.testing.assert_close(found, expected)
    gradients(model, ids)
    assert graphs.count == 2


@pytest.mark.parametrize("family", ["tiny", "tiny_gpt2"])
def test_compiling_renames_nothing_and_the_split_can_be_undone(request, family, ids):
    model = model_of(request.getfixturevalue(family))
    plain = deepcopy(model)
    compile_layers(model, backend="eager")
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    expected = plain.state_dict()
    found = merge_fused(model).state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_model_without_repeated_layers_is_compiled_as_a_whole():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = nn.Linear(2, 2)

        def forward(self, x):
            return self.only(x).relu()

    model = Plain()
    graphs = Graphs()
    assert compile_layers(model, backend=graphs) == [model]
    model(torch.ones(1, 2))
    assert graphs.count == 1


def test_layers_of_several_classes_are_not_taken_for_repeated_ones():
    mixed = nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)])
    alike = nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])) for _ in range(3)])
    assert repeated_layers(nn.Sequential(mixed)) == []
    assert repeated_layers(nn.Sequential(mixed, alike)) == list(alike)


def test_inside_run_eagerly_nothing_is_compiled(tiny, ids):
    model = model_of(tiny)
    graphs = Graphs()
    compile_layers(model, backend=graphs)
    with run_eagerly(model):
        model(input_ids=ids, labels=ids)
    assert graphs.count == 0


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_compiled_layers_inside_ddp_and_fsdp2_stay_one_graph(tiny_gpt2, ids, engine):
    model = model_of(tiny_gpt2, layers=3)
    plain = deepcopy(model)
    graphs = Graphs()
    compile_layers(model, backend=graphs)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if engine == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            for layer in model.transformer.h:
                fully_shard(layer)
            wrapped = fully_shard(model)
        for each in (wrapped, plain):
            each(input_ids=ids, labels=ids).loss.backward()
        found = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()]
    finally:
        dist.destroy_process_group()
    for gradient, parameter in zip(found, plain.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    assert graphs.count == 2


# Runs
# ---------------------------------------------------------------------------------------------------------------


def losses(out):
    return [(row["train_loss"], row["val_loss"]) for row in read_metrics(out / "metrics.jsonl")]


def same_losses(out, other):
    for found, expected in zip(losses(out), losses(other), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def short(tiny_gpt2):
    return replace(
        tiny_gpt2, steps=8, eval_tokens=560, precision="fp32", optim=replace(tiny_gpt2.optim, base_lr=1e-3)
    )


def test_a_compiled_run_has_the_losses_of_an_uncompiled_one_and_evaluates_uncompiled(
    short, tmp_path, monkeypatch
):
    train(short, tmp_path / "eager")
    graphs = Graphs()
    monkeypatch.setattr(assembly, "compile_layers", partial(compile_layers, backend=graphs))
    # 560 tokens are 35 windows, so the last batch of an evaluation has another shape than those before.
    train(replace(short, compile=True, sharpness_at=(4,)), tmp_path / "compiled")
    assert graphs.count == 2
    same_losses(tmp_path / "compiled", tmp_path / "eager")
    AutoModelForCausalLM.from_pretrained(tmp_path / "compiled" / "checkpoint-8")
    assert evaluate_run(tmp_path / "compiled")["val_loss"] == pytest.approx(
        losses(tmp_path / "compiled")[-1][1], abs=1e-5
    )
    names = ("config.json", "generation_config.json")
    for name in names:
        files = [tmp_path / run / "checkpoint-8" / name for run in ("eager", "compiled")]
        assert files[0].read_text() == files[1].read_text()


@pytest.mark.slow
def test_a_run_whose_whole_model_was_compiled_before_resumes(short, tmp_path, monkeypatch):
    train(short, tmp_path / "eager")
    arguments = assembly.training_arguments

    def whole_model(*args, **kwargs):
        found = arguments(*args, **kwargs)
        found.torch_compile, found.torch_compile_backend = True, "eager"
        return found

    config = replace(short, compile=True, save_every=4)
    with monkeypatch.context() as before:  # earlier versions let accelerate compile the model
        before.setattr("blockwise_lr.train.run.training_arguments", whole_model)
        before.setattr(assembly, "compile_layers", lambda model: None)
        train(config, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "checkpoint-8" / "manifest.json").unlink()
    monkeypatch.setattr(assembly, "compile_layers", partial(compile_layers, backend="eager"))
    train(config, tmp_path / "run")
    assert [checkpoint.name for checkpoint in checkpoints(tmp_path / "run")] == [
        "checkpoint-4",
        "checkpoint-8",
    ]
    same_losses(tmp_path / "run", tmp_path / "eager")


# Attention
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tiny", "tiny_gpt2"])
def test_attention_without_a_mask_is_the_same_to_the_bit_and_is_not_saved(request, family, ids, tmp_path):
    config = request.getfixturevalue(family)
    plain = split_fused(build_model(config.model, seed=0))
    model = deepcopy(plain)
    use_unmasked_attention(model)
    for found, expected in zip(gradients(model, ids), gradients(plain, ids), strict=True):
        assert torch.equal(found, expected)
    model.save_pretrained(tmp_path / "unmasked")
    plain.save_pretrained(tmp_path / "plain")
    saved = [(tmp_path / name / "config.json").read_text() for name in ("unmasked", "plain")]
    assert saved[0] == saved[1]


def test_another_attention_than_sdpa_stays(tiny):
    model = build_model(tiny.model, seed=0)
    model.set_attn_implementation("eager")
    use_unmasked_attention(model)
    assert model.config._attn_implementation == "eager"
