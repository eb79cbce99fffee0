"""The scale that an initializer gives, without the weights: as measured on the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from blockwise_lr import Block, classify, initial_scales, split_fused
from blockwise_lr.optim.initial_scales import scales_of_rms
from blockwise_lr.optim.recorded_initializers import RecordedInitializers, initial_rms, rms_by_block
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig
from blockwise_lr.train.initial_rms import initial_rms_of, initial_scales_of
from support import tiny_models
from support.architectures import CAUSAL, tiny_config


def filled(initialize):
    """A weight of 200 x 300 after an initializer, and the RMS that was recorded of the same on meta."""
    torch.manual_seed(0)
    with RecordedInitializers() as recorded, torch.device("meta"):
        on_meta = initialize(nn.Parameter(torch.empty(200, 300)))
    real = initialize(nn.Parameter(torch.empty(200, 300)))
    return real.detach(), recorded.rms(on_meta)


def in_place(*operations):
    def initialize(weight):
        with torch.no_grad():
            for name, *arguments in operations:
                getattr(weight, name)(*arguments)
        return weight

    return initialize


INITIALIZERS = {
    "normal": lambda weight: nn.init.normal_(weight, mean=0.1, std=0.3),
    "uniform": lambda weight: nn.init.uniform_(weight, -0.1, 0.3),
    "kaiming": nn.init.kaiming_uniform_,
    "xavier": nn.init.xavier_normal_,
    "constant": lambda weight: nn.init.constant_(weight, 0.7),
    "zeros": nn.init.zeros_,
    "ones": nn.init.ones_,
    "truncated": lambda weight: nn.init.trunc_normal_(weight, std=0.5, a=-0.4, b=0.6),
    "orthogonal": lambda weight: nn.init.orthogonal_(weight, gain=1.5),
    "sparse": lambda weight: nn.init.sparse_(weight, sparsity=0.5, std=0.1),
    "in place": in_place(("normal_", 0, 0.1), ("mul_", 2), ("clamp_", -0.1, 0.3)),
    "by hand": in_place(("uniform_", -0.5, 0.5), ("erfinv_",), ("mul_", 0.3), ("add_", 0.2)),
    "made of another": lambda weight: nn.Parameter(torch.randn(weight.shape) * 0.3),
}


@pytest.mark.parametrize("name", INITIALIZERS)
def test_the_rms_of_an_initializer_is_that_of_its_weights(name):
    real, rms = filled(INITIALIZERS[name])
    assert rms == pytest.approx(real.square().mean().sqrt().item(), rel=0.02, abs=1e-9)


def test_a_padding_row_does_not_count_and_half_a_weight_makes_it_unknown():
    def initialize(weight, rows):
        with torch.no_grad():
            weight.normal_(0, 0.2)
            weight[:rows].zero_()
        return weight

    assert filled(lambda weight: initialize(weight, 1))[1] == pytest.approx(0.2)
    assert filled(lambda weight: initialize(weight, 100))[1] is None


def test_values_that_are_not_followed_are_not_known():
    for initialize in (
        lambda weight: weight,  # memory as it was
        lambda weight: nn.Parameter(torch.arange(60_000.0).reshape(200, 300)),
        lambda weight: nn.Parameter(torch.randn(200, 200) @ torch.randn(200, 300)),
    ):
        assert filled(initialize)[1] is None


def test_torchs_initializers_are_its_own_again_afterwards():
    before = dict(vars(nn.init))
    with RecordedInitializers():
        assert vars(nn.init) != before
    assert vars(nn.init) == before
    with pytest.raises(RuntimeError), RecordedInitializers():
        torch.zeros(2) @ torch.zeros(3)
    assert vars(nn.init) == before


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_configurations_scales_are_those_of_its_weights(family):
    config = ModelConfig(family=family, hidden_size=64, layers=2, vocab_size=512)
    assert initial_scales_of(config) == initial_scales(split_fused(build_model(config, seed=0)))


def test_zeros_are_left_out_and_fused_parts_count_for_their_own_blocks():
    def build():
        with torch.device("meta"):
            return tiny_models.gpt2(n_layer=2)

    model, rms = initial_rms_of(build)
    found = rms_by_block(rms, classify(model))
    residual = 0.02 / math.sqrt(4)
    assert found[Block.QK] == pytest.approx(0.02)
    assert found[Block.VO] == pytest.approx(math.sqrt((0.02**2 + residual**2) / 2))
    assert Block.QKV not in found
    assert scales_of_rms(found)[Block.NORM] == 1.0


def test_a_model_with_weights_is_measured_and_not_initialised_again():
    model = tiny_models.llama()
    nn.init.constant_(model.lm_head.weight, 3.0)
    same, rms = initial_rms_of(lambda: model)
    assert same is model
    assert rms["lm_head.weight"] == pytest.approx(3.0)
    assert (model.lm_head.weight == 3).all()


def check_architecture(kind):
    """Every known RMS on meta is that of the weights, up to the error of their number."""
    config = tiny_config(kind)

    def build():
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    _, rms = initial_rms_of(build)
    torch.manual_seed(0)
    for name, parameter in AutoModelForCausalLM.from_config(config).named_parameters():
        if rms.get(name) is not None and parameter.numel() >= 64:
            real = parameter.detach().float().square().mean().sqrt().item()
            error = 5 * max(real, rms[name]) / math.sqrt(2 * parameter.numel())
            assert abs(real - rms[name]) <= error + 1e-7, f"{kind}: {name} {rms[name]} {real}"


@pytest.mark.parametrize("kind", ["gemma2", "gpt_neox", "mixtral", "opt", "diffllama", "xlnet"])
def test_architectures_start_as_their_weights_do(kind):
    check_architecture(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CAUSAL)
def test_every_architecture_starts_as_its_weights_do(kind):
    if kind == "modernbert-decoder":
        pytest.skip("its embedding module, not the embedding, initialises the weight that the head shares")
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(tiny_config(kind))
    except Exception as error:
        pytest.skip(f"{kind} cannot be built alone: {error}")
    check_architecture(kind)


def test_a_model_of_transformers_inside_another_module_is_initialised_too():
    def build():
        with torch.device("meta"):
            return nn.ModuleDict({"inner": tiny_models.llama(tie_word_embeddings=True)})

    rms = initial_rms_of(build)[1]
    assert rms["inner.model.embed_tokens.weight"] == pytest.approx(0.02)
    assert rms["inner.model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.02)


def test_an_initializer_that_needs_values_leaves_all_unknown():
    def build():
        with torch.device("meta"):
            model = tiny_models.llama()
        model._init_weights = lambda module: torch.ones(1, device="meta").item()
        return model

    assert set(initial_rms_of(build)[1].values()) == {None}
    assert initial_rms(tiny_models.llama(), RecordedInitializers())
