"""Tensor parallelism by transformers' own plans, two processes: blocks, groups, sharpness and steps as on one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from blockwise_lr import (
    AdamMini,
    AutoRatios,
    AutoRule,
    Block,
    SharpnessReport,
    classify,
    clip_grad_norm_by_block,
    cosine_schedule,
    measure_directional,
    measure_sharpness,
    param_groups,
)
from blockwise_lr.optimizers.muon import Muon
from blockwise_lr.sharpness.parameter_parts import ParameterParts
from blockwise_lr.sharpness.training_gradients import gradient_report, squared_gradients
from support.processes import free_port, spawn

LR = 1e-3
VOCAB = 40
WIDTHS = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": VOCAB}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}  # grouped queries
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamw": functools.partial(torch.optim.AdamW, lr=LR),
    "adam-mini": AdamMini,
    "muon": functools.partial(Muon, lr=LR),
}
READ_BY_AUTO = ("adamw", "adam-mini")
ESTIMATORS: dict[str, dict[str, Any]] = {
    "fisher": {"probes": 2, "histogram": True},
    "accumulated": {"accumulate": 2},
    "empirical": {"estimator": "empirical", "histogram": True},
    "finite-differences": {"estimator": "hutchinson", "hvp": "finite-differences"},
}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**WIDTHS, **HEADS))


def qwen3() -> nn.Module:
    """Its norms of queries and keys see the heads of one process only."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**WIDTHS, **HEADS, head_dim=4))


def qwen2() -> nn.Module:
    """Biases, which are sharded as their weights are, and an embedding that is also the head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**WIDTHS, **HEADS, tie_word_embeddings=True))


def mixtral() -> nn.Module:
    """Experts in stacks, of which gate and up are one tensor: each process has stretches of both."""
    from transformers import MixtralConfig, MixtralForCausalLM

    # Grouped matrix products need shards of a multiple of 16 bytes.
    sizes = {**WIDTHS, "intermediate_size": 32}
    return MixtralForCausalLM(MixtralConfig(**sizes, **HEADS, num_local_experts=4, num_experts_per_tok=2))


pytestmark = pytest.mark.slow  # two processes train every model: most of a minute

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "qwen3": qwen3,
    "qwen2": qwen2,
    "mixtral": mixtral,
}


def batches(steps: int = 4) -> list[dict[str, Tensor]]:
    found = []
    for step in range(steps):
        ids = torch.randint(3, VOCAB, (4, 8), generator=torch.Generator().manual_seed(step))
        labels = ids.clone()
        labels[0, : step + 1] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def built(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():  # a router whose choices rounding does not change
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model


def sharpness(model: nn.Module) -> dict[str, Any]:
    return {
        name: measure_sharpness(model, batches(), **options).to_dict() for name, options in ESTIMATORS.items()
    }


def read_off(model: nn.Module) -> dict[str, Any]:
    """Norms and sharpness of the gradients of a training step, which are clipped."""
    model.zero_grad()
    model(**batches()[0]).loss.backward()
    report = gradient_report(
        parts := ParameterParts(model, None, distributed=False), squared_gradients(parts), samples=27
    )
    norms = clip_grad_norm_by_block(model, 0.1)
    return {
        "read off": report.to_dict(),
        "norms": {block.value: float(norm) for block, norm in norms.items()},
        "clipped": {block.value: float(norm) for block, norm in clip_grad_norm_by_block(model, 0.1).items()},
    }


def trained(model: nn.Module, optimizer: str) -> dict[str, Any]:
    """Three steps, whole weights, and the sharpness that Adam's second moment tells."""
    made = OPTIMIZERS[optimizer](param_groups(model, LR))
    for batch in batches(3):
        made.zero_grad()
        model(**batch).loss.backward()
        made.step()
    found: dict[str, Any] = {"weights": {name: whole(p).clone() for name, p in model.named_parameters()}}
    if optimizer == "adamw":
        report = measure_sharpness(model, estimator="optimizer", optimizer=made, samples=28)
        found["optimizer"] = report.to_dict()
    return found


def moved_ratios(model: nn.Module, optimizer: str) -> dict[str, float]:
    """By AutoRatios, over six steps."""
    made = OPTIMIZERS[optimizer](param_groups(model, LR))
    schedule = cosine_schedule(made, warmup_steps=1, total_steps=12)
    auto = AutoRatios(made, schedule, AutoRule(start=0.0))
    before = auto.ratios
    for batch in batches(6):
        made.zero_grad()
        model(**batch).loss.backward()
        made.step()
        schedule.step()
    assert auto.ratios != before
    return {block.value: ratio for block, ratio in auto.ratios.items()}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def structure(model: nn.Module) -> dict[str, Any]:
    groups = param_groups(model, LR)
    return {
        "blocks": {name: block.value for name, block in classify(model).items()},
        "counts": {block.value: count for block, count in classify(model).counts().items()},
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            | {"shapes": [tuple(p.shape) for p in group["params"]]}
            for group in groups
        ],
    }


def refused(work: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        work()
    return str(caught.value)


def worker(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name in MODELS:
        sharded = load(folder / name)
        assert sum(isinstance(p, DTensor) for p in sharded.parameters()) >= 5
        found[name] = {"structure": structure(sharded), **sharpness(sharded), **read_off(sharded)}
        for optimizer in OPTIMIZERS:
            found[name][optimizer] = trained(load(folder / name), optimizer)
        found[name]["ratios"] = {each: moved_ratios(load(folder / name), each) for each in READ_BY_AUTO}
    sharded = load(folder / "llama")
    others = batches()[rank : rank + 1]
    found["refused"] = {
        "other batches": refused(lambda: measure_sharpness(sharded, others)),
        "partial": refused(lambda: measure_sharpness(unsummed(folder), batches())),
        "more batches": refused(lambda: measure_sharpness(sharded, batches(4 - rank))),
        "shares": refused(lambda: measure_sharpness(sharded, batches(), distributed=True)),
        "directional": refused(
            lambda: measure_directional(sharded, torch.optim.AdamW(param_groups(sharded, LR)), batches())
        ),
    }
    torch.save(found, folder / f"{rank}.pt")
    distributed.barrier()  # one that is gone while another still listens aborts that one
    distributed.destroy_process_group()


def load(folder: Path, plan: Any = None) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    plan = plan or DistributedConfig(tp_plan="auto", tp_size=2)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan).eval()


def unsummed(folder: Path) -> Any:
    """A plan that leaves the gradients of the norms of queries and keys as each process computes them."""
    from transformers.distributed import DistributedConfig

    plan = {f"model.layers.*.self_attn.{norm}": "replicate" for norm in ("q_norm", "k_norm")}
    return load(folder / "qwen3", DistributedConfig(tp_plan=plan, tp_size=2))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for name in MODELS:
        built(name).save_pretrained(folder / name)
    spawn(worker, (free_port(), folder), 2)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for name in MODELS:
        for estimator in ESTIMATORS:
            assert first[name][estimator] == second[name][estimator]
        assert first[name]["ratios"] == second[name]["ratios"]
    return first


def same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    one, other = (SharpnessReport.from_dict(report) for report in (found, expected))
    assert dict(one).keys() == dict(other).keys()
    for block, estimate in other.items():
        assert one[block].mean == pytest.approx(estimate.mean, rel=tolerance), block
        assert one[block].numel == estimate.numel
    assert (one.samples, one.weights, one.batches) == (other.samples, other.weights, other.batches)
    for block, histogram in other.histograms.items():
        assert sum(one.histograms[block].counts) + one.histograms[block].zeros == other[block].numel
        assert sum(histogram.counts) == pytest.approx(sum(one.histograms[block].counts), rel=0.02)


@pytest.mark.parametrize("model", MODELS)
def test_blocks_and_groups_are_those_of_the_whole_model(found: dict[str, Any], model: str) -> None:
    assert found[model]["structure"] == structure(built(model))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sharpness_is_that_of_the_whole_model(found: dict[str, Any], model: str, estimator: str) -> None:
    # Differences of gradients in float32 are good to 1e-3.
    tolerance = 1e-2 if estimator == "finite-differences" else 1e-5
    same(found[model][estimator], sharpness_of(model)[estimator], tolerance)


@functools.cache
def sharpness_of(model: str) -> dict[str, Any]:
    return sharpness(built(model))


@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_training_are_measured_and_clipped_as_those_of_the_whole_model(
    found: dict[str, Any], model: str
) -> None:
    expected = read_off(built(model))
    same(found[model]["read off"], expected["read off"], 1e-5)
    assert found[model]["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert found[model]["clipped"] == pytest.approx(expected["clipped"], rel=1e-5)
    assert max(expected["norms"].values()) > 0.1 >= max(expected["clipped"].values()) * 0.999


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_three_steps_lead_where_those_of_the_whole_model_lead(
    found: dict[str, Any], model: str, optimizer: str
) -> None:
    before, expected = built(model), trained(built(model), optimizer)
    after = found[model][optimizer]["weights"]
    for name, weight in expected["weights"].items():
        apart = after[name] - weight
        if optimizer == "muon":  # it orthogonalises in bfloat16, which makes rounding grow
            assert apart.norm() < 0.05 * (weight - before.get_parameter(name)).norm(), name
        else:
            assert float(apart.abs().max()) < 1e-5, name
    assert not torch.equal(after["model.norm.weight"], before.state_dict()["model.norm.weight"])
    if optimizer == "adamw":
        same(found[model][optimizer]["optimizer"], expected["optimizer"], 1e-4)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", READ_BY_AUTO)
def test_auto_moves_the_ratios_as_on_the_whole_model(
    found: dict[str, Any], model: str, optimizer: str
) -> None:
    expected = moved_ratios(built(model), optimizer)
    assert found[model]["ratios"][optimizer] == pytest.approx(expected, rel=1e-4)


def test_what_would_be_wrong_is_refused(found: dict[str, Any]) -> None:
    messages = found["refused"]
    assert "processes have different batches; under tensor parallelism" in messages["other batches"]
    assert "which every process has whole, differs between processes: under" in messages["partial"]
    assert "only 1 of 2 processes have more than 3 batches" in messages["more batches"]
    assert "the same batches on every process, not with shares" in messages["shares"]
    assert "measure_directional does not support tensor parallelism" in messages["directional"]


def test_the_test_has_every_kind_of_block() -> None:
    kinds = {block for name in MODELS for block in deepcopy(classify(built(name))).counts()}
    assert {Block.EMB, Block.QK, Block.VO, Block.FFN, Block.NORM, Block.HEAD} <= kinds
