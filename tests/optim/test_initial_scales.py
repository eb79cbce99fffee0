"""Ratios over the initial scale: the same model, initialised at another scale, trains the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from blockwise_lr import (
    MEASURED_RATIOS,
    AutoRatios,
    Block,
    build_optimizer,
    classify,
    cosine_schedule,
    initial_scales,
    param_groups,
    set_lr,
    split_fused,
)
from blockwise_lr.optim import REFERENCE_SCALES, load_optimizer_state
from support import tiny_models

BASE, STEPS = 1e-3, 30
SCALES = {"emb": 50.0, "head": 0.1, "qk": 10.0, "norm": 5.0}
"""How much larger each block starts in the second initialisation."""


class Multiplied(nn.Module):
    """The weight that the forward pass uses: the parameter times a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor


def reference_model() -> nn.Module:
    """A LLaMA in float64 whose blocks have exactly the reference scales."""
    model = tiny_models.llama().double()
    blocks = classify(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= REFERENCE_SCALES[blocks[name]] / parameter.square().mean().sqrt()
    return model


def rescaled_model(scales: dict[str, float]) -> nn.Module:
    """The same function: each block starts `scale` times larger, and the forward pass divides it again."""
    model = reference_model()
    blocks = classify(model)
    for name, parameter in list(model.named_parameters()):
        scale = scales.get(blocks[name], 1.0)
        parameter.data *= scale
        path, _, attribute = name.rpartition(".")
        parametrize.register_parametrization(
            model.get_submodule(path), attribute, Multiplied(1 / scale), unsafe=True
        )
    return model


def losses(model, *, base=BASE, eps_scales=None, weight_decay=0.1, **options):
    """The losses of AdamW with a cosine schedule, whose eps follows the scale of each block."""
    groups = param_groups(model, base, MEASURED_RATIOS, weight_decay=weight_decay, **options)
    for group in groups:  # a gradient is smaller by the factor by which the parameter is larger
        group["eps"] = 1e-8 / (eps_scales or {}).get(group["block"], 1.0)
    optimizer = torch.optim.AdamW(groups, lr=base, betas=(0.9, 0.95))
    schedule = cosine_schedule(optimizer, warmup_steps=5, total_steps=STEPS, floor=base / 4)
    ids = torch.randint(0, 40, (4, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("decay", ["coupled", "constant"])
def test_the_same_model_at_another_initial_scale_trains_the_same(decay):
    """Also with decay, a shared floor and a warm-up; and without relative_to it does not."""
    expected = losses(reference_model(), decay=decay)
    assert expected[-1] < expected[0] - 0.5
    found = losses(rescaled_model(SCALES), eps_scales=SCALES, decay=decay, relative_to="init")
    assert found == pytest.approx(expected, rel=1e-9)
    unrelated = losses(rescaled_model(SCALES), eps_scales=SCALES, decay=decay)
    assert max(abs(a - b) for a, b in zip(unrelated, expected)) > 0.1


def test_a_base_learning_rate_goes_with_the_scale_of_ffn():
    """All matrices k times larger: the base rate k times larger and the decay k times smaller train the same."""
    scales = dict.fromkeys(("emb", "head", "qk", "vo", "ffn"), 5.0)
    found = losses(
        rescaled_model(scales),
        base=5 * BASE,
        weight_decay=0.1 / 5,
        eps_scales=scales,
        relative_to="init",
    )
    assert found == pytest.approx(losses(reference_model()), rel=1e-9)


def test_a_model_with_the_reference_scales_has_exactly_the_groups_of_no_reference():
    model = tiny_models.llama(hidden_size=64, intermediate_size=128, vocab_size=500)
    for decay in ("coupled", "constant"):
        plain = param_groups(model, 1e-3, "measured", decay=decay)
        related = param_groups(model, 1e-3, "measured", decay=decay, relative_to="init")
        for old, new in zip(plain, related, strict=True):
            assert new.pop("init_scale") == 1.0
            assert new.pop("init_rms") == REFERENCE_SCALES[Block(new["block"])]
            assert all(a is b for a, b in zip(old.pop("params"), new.pop("params"), strict=True))
            assert new == old


def test_an_embedding_that_starts_at_1_gets_50_times_the_rate_and_decays_as_before():
    model = tiny_models.llama(hidden_size=64, intermediate_size=128, vocab_size=500)
    nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    plain, related = (
        {g["block"]: g for g in param_groups(model, 1e-3, "measured", relative_to=to)}
        for to in (None, "init")
    )
    assert related["emb"]["lr"] == pytest.approx(50 * plain["emb"]["lr"])
    assert related["emb"]["lr"] * related["emb"]["weight_decay"] == pytest.approx(plain["emb"]["lr"] * 0.1)
    assert (related["emb"]["init_scale"], related["emb"]["init_rms"]) == (50.0, 1.0)
    assert {b: g["lr"] for b, g in related.items() if b != "emb"} == {
        b: g["lr"] for b, g in plain.items() if b != "emb"
    }


def test_scales_are_root_mean_squares_to_two_digits_over_what_does_not_start_at_zero():
    model = split_fused(tiny_models.gpt2(n_embd=64, vocab_size=500))
    layers = 2
    residual = 0.02 / math.sqrt(2 * layers)  # of GPT-2's output projections; its biases start at zero
    half = math.sqrt((0.02**2 + residual**2) / 2)
    assert initial_scales(model) == {
        Block.EMB: 0.02,
        Block.POS: 0.02,
        Block.QK: 0.02,
        Block.VO: float(f"{half:.2g}"),
        Block.FFN: float(f"{half:.2g}"),
        Block.NORM: 1.0,
    }


def test_a_block_that_starts_at_zero_has_no_scale_until_it_is_given_one():
    model = tiny_models.llama(hidden_size=64, intermediate_size=128, vocab_size=500)
    nn.init.zeros_(model.lm_head.weight)
    assert Block.HEAD not in initial_scales(model)
    with pytest.raises(
        ValueError, match="relative_to needs the initial scale of head, and there is none"
    ) as error:
        param_groups(model, 1e-3, relative_to="init")
    remedy = '{**initial_scales(model), "head": 0.02}'
    assert f"relative_to={remedy}" in str(error.value)
    scales = eval(remedy, {"initial_scales": initial_scales, "model": model})
    groups = param_groups(model, 1e-3, "measured", relative_to=scales)
    assert next(g["lr"] for g in groups if g["block"] == "head") == pytest.approx(16e-3)


def test_gains_that_are_stored_as_their_difference_from_1_have_scale_1():
    model = tiny_models.llama()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.zeros_(parameter)
    assert initial_scales(model)[Block.NORM] == 1.0


def test_blocks_without_a_reference_keep_their_rate():
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3), "wte": nn.Embedding(64, 64)})
    groups = param_groups(model, 1e-3, {"conv": 3.0}, relative_to={"emb": 0.02, "ffn": 0.01})
    assert {g["block"]: (g["lr"], g.get("init_rms")) for g in groups} == {
        "conv": (3e-3, None),
        "emb": (2e-3, 0.02),
    }


@pytest.mark.parametrize(
    ("relative_to", "message"),
    [
        ("start", "relative_to is 'start'; expected \"init\", None, or the initial scale of each block"),
        ({"wte": 1.0}, "relative_to: 'wte' is not a block; the blocks are emb"),
        ({"emb": 0.0}, "relative_to: emb is 0.0; expected a finite number above 0"),
        ({"ffn": 0.02}, "relative_to needs the initial scale of norm, and there is none"),
    ],
)
def test_wrong_references_are_refused(relative_to, message):
    with pytest.raises(ValueError) as error:
        param_groups(tiny_models.llama(), 1e-3, relative_to=relative_to)
    assert message in str(error.value)


def test_a_model_on_meta_has_nothing_to_measure():
    with torch.device("meta"):
        model = tiny_models.llama()
    with pytest.raises(ValueError, match="is on the meta device, so it has no initial values yet"):
        param_groups(model, 1e-3, relative_to="init")


def started_and_trained():
    """A model with its embedding at 1.0, its optimizer, and the same model with trained weights of another scale."""
    model = tiny_models.llama(hidden_size=64, intermediate_size=128, vocab_size=500)
    nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, "measured", relative_to="init"), lr=1e-3)
    for parameter in model.parameters():
        parameter.data *= 1.7
    return model, optimizer


@pytest.mark.parametrize("decay", ["coupled", "constant"])
def test_a_resumed_optimizer_keeps_the_scales_at_start(decay):
    """The scales of the trained weights, which the new groups have, are no change of settings."""
    model = tiny_models.llama(hidden_size=64, intermediate_size=128, vocab_size=500)
    nn.init.normal_(model.get_input_embeddings().weight, std=1.0)

    def make():
        groups = param_groups(model, 1e-3, "measured", decay=decay, relative_to="init")
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        return optimizer, cosine_schedule(optimizer, warmup_steps=2, total_steps=20, floor=1e-4)

    optimizer, schedule = make()
    for _ in range(5):
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        model.get_input_embeddings().weight *= 3
    resumed, its_schedule = make()
    assert resumed.param_groups[1]["init_scale"] == 150.0
    resumed.load_state_dict(optimizer.state_dict())
    its_schedule.load_state_dict(schedule.state_dict())
    for old, new in zip(optimizer.param_groups, resumed.param_groups, strict=True):
        assert {k: v for k, v in new.items() if k != "params"} == {
            k: v for k, v in old.items() if k != "params"
        }


def test_other_ratios_are_still_a_change_and_new_ones_get_the_scale_at_start():
    model, optimizer = started_and_trained()
    other = torch.optim.AdamW(param_groups(model, 2e-3, {"emb": 8}, relative_to="init"), lr=2e-3)
    with pytest.raises(
        ValueError, match="base learning rate is 0.001 there and 0.002 here; ratio of norm is 32"
    ):
        load_optimizer_state(other, optimizer.state_dict())
    with pytest.warns(UserWarning, match="goes on with new settings"):
        load_optimizer_state(other, optimizer.state_dict(), on_change="use_new")
    emb = next(g for g in other.param_groups if g["block"] == "emb")
    assert (emb["init_scale"], emb["lr_ratio"]) == (50.0, pytest.approx(400.0))
    assert (emb["lr"], emb["weight_decay"]) == (pytest.approx(0.8), pytest.approx(0.1 / 50))


def test_giving_up_the_reference_is_a_change_of_settings():
    model, optimizer = started_and_trained()
    plain = torch.optim.AdamW(param_groups(model, 1e-3, "measured"), lr=1e-3)
    with pytest.raises(ValueError, match="ratio of emb is 800 there and 16 here"):
        load_optimizer_state(plain, optimizer.state_dict())
    with pytest.warns(UserWarning, match="goes on with new settings"):
        load_optimizer_state(plain, optimizer.state_dict(), on_change="use_new")
    assert all("init_scale" not in group for group in plain.param_groups)


def test_set_lr_and_build_optimizer_take_the_scale_into_account():
    model = tiny_models.llama(hidden_size=64, intermediate_size=128, vocab_size=500)
    nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    optimizer = build_optimizer("adamw", model, 1e-3, "measured", relative_to="init")
    set_lr(optimizer, 1e-4)
    rates = {g["block"]: g["lr"] for g in optimizer.param_groups}
    assert (rates["emb"], rates["ffn"]) == (pytest.approx(800e-4), pytest.approx(1e-4))


def test_moving_ratios_stay_ratios_over_the_scale():
    """AutoRatios bounds the ratio without the factor, and the groups hold their product."""
    model = tiny_models.llama()
    scales = {**REFERENCE_SCALES, Block.EMB: 2.0}
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, "measured", relative_to=scales), lr=1e-3)
    schedule = cosine_schedule(optimizer, warmup_steps=0, total_steps=100, floor=1e-5)
    with AutoRatios(optimizer, schedule) as auto:
        assert auto.ratios == pytest.approx(dict(MEASURED_RATIOS))
        auto._set_log_ratios({Block.EMB: math.log(8.0)})
        assert auto.ratios[Block.EMB] == pytest.approx(8.0)
    emb = next(g for g in optimizer.param_groups if g["block"] == "emb")
    assert (emb["lr_ratio"], emb["initial_lr"]) == (pytest.approx(800.0), pytest.approx(0.8))
