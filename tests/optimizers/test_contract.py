"""What every optimizer of the registry does with groups by block; the exceptions are listed, with the reason.

`ALLOWED` says which optimizer need not keep which promise. An entry that is no longer needed fails its test, so that
the list stays true.
"""

from __future__ import annotations

import copy
import functools
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from blockwise_lr import cosine_schedule, param_groups, split_fused
from blockwise_lr.directional.updates import stepped_updates
from blockwise_lr.optimizers.muon import Muon
from blockwise_lr.optimizers.registry import OPTIMIZERS, build_optimizer, optimizer_class, optimizer_entry
from support.processes import free_port, spawn

VOCAB, CONTEXT = 61, 12
LR = 2e-3
RATIOS = {"emb": 3.0, "qk": 2.0, "vo": 0.5, "head": 3.0}

pytest.importorskip("pytorch_optimizer", reason="pip install '.[optimizers]'")

_SOAP = (
    "its first eigenbases are of matrices of low rank, whose null space has no basis of its own: the last bit of a "
    "gradient turns them"
)
ALLOWED: dict[str, dict[str, str]] = {
    "plain": {
        "muon": "without blocks it cannot tell an embedding from a matrix; test_muon.py holds it to torch's Muon",
        "adam-mini": "it takes groups that say how parameters are cut; test_adam_mini.py holds it to the package",
        "sophia": "it draws its random probes in the order of the parameters, and groups change that order",
    },
    "accumulation": {"soap": _SOAP},
    "ddp": {
        "sophia": "it needs gradients with a graph, and DDP averages them in place, which torch refuses",
        "soap": _SOAP,
    },
    "fsdp2": {
        "adafactor": "torch's Adafactor does not take sharded parameters",
        "adan": "torch has no rule for _foreach_copy_ of sharded tensors",
        "sophia": "FSDP2's hooks leave no graph on the gradients, and its curvature estimate needs one",
        "soap": "its preconditioners are plain tensors, which torch refuses to mix with sharded gradients",
    },
}


def keeps(promise: str) -> list[Any]:
    """The optimizers that must keep a promise, and those that need not, as expected failures that must fail."""
    allowed = ALLOWED.get(promise, {})
    return [
        pytest.param(name, marks=[pytest.mark.xfail(reason=allowed[name], strict=True)])
        if name in allowed
        else name
        for name in OPTIMIZERS
    ]


@functools.cache
def initial_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=CONTEXT, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def llama() -> LlamaForCausalLM:
    return copy.deepcopy(initial_llama())


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def base_lr(name: str) -> float:
    """One that suits a model of this size: AdamW's times the advice."""
    return LR * (optimizer_entry(name).lr_factor or 20.0)  # SGD's is not known


# A test of a few steps would otherwise never see a new basis.
EXTRA: dict[str, dict[str, Any]] = {"soap": {"precondition_frequency": 2}}


def build(
    name: str, model: nn.Module, ratios: Any = RATIOS, *, faster: float = 1.0, **options: Any
) -> Optimizer:
    return build_optimizer(name, model, faster * base_lr(name), ratios, **EXTRA.get(name, {}), **options)


def build_plainly(name: str, parameters: Any) -> Optimizer:
    """The optimizer on parameters, or on groups made by hand, with the registry's settings and nothing of ours."""
    cls, options = optimizer_class(name)
    decay = optimizer_entry(name).weight_decay
    return cls(parameters, lr=base_lr(name), weight_decay=decay, **options, **EXTRA.get(name, {}))


def batch(i: int, rows: int = 4) -> Tensor:
    """Runs through the alphabet from anywhere: what comes next can be learned."""
    starts = torch.randint(VOCAB, (rows, 1), generator=torch.Generator().manual_seed(i))
    return (starts + torch.arange(CONTEXT)) % VOCAB


def backward(name: str, model: nn.Module, ids: Tensor, scale: float = 1.0) -> float:
    loss = model(input_ids=ids, labels=ids).loss
    (loss * scale).backward(create_graph=name == "sophia")
    return loss.item()


def step(optimizer: Optimizer) -> None:
    torch.manual_seed(7)  # of Sophia's probes
    optimizer.step()
    optimizer.zero_grad()


def train(
    name: str, model: nn.Module, optimizer: Optimizer, steps: range, schedule: Any = None
) -> list[float]:
    losses = []
    for i in steps:
        losses.append(backward(name, model, batch(i)))
        step(optimizer)
        if schedule is not None:
            schedule.step()
    return losses


def differing(a: nn.Module, b: nn.Module) -> list[str]:
    """Names of the parameters that are not bit-equal."""
    others = dict(b.named_parameters())
    return [name for name, p in a.named_parameters() if not torch.equal(p, others[name])]


def tensors(optimizer: Optimizer) -> list[Tensor]:
    def walk(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        inner = (
            value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        )
        return [tensor for each in inner for tensor in walk(each)]

    return walk(optimizer.state_dict()["state"])


@pytest.mark.filterwarnings("ignore:Using backward")
class TestEveryOptimizer:
    @pytest.mark.parametrize("name", keeps("converges"))
    def test_converges_on_a_small_llama(self, name: str) -> None:
        model = llama()
        optimizer = build(name, model, {"emb": 2.0}, faster=5.0)
        schedule = cosine_schedule(optimizer, warmup_steps=5, total_steps=80, floor=0.0)
        losses = train(name, model, optimizer, range(80), schedule)
        assert math.isclose(losses[0], math.log(VOCAB), rel_tol=0.05)
        assert sum(losses[-5:]) / 5 < 0.9 * losses[0]

    @pytest.mark.parametrize("name", keeps("ratio"))
    def test_a_ratio_is_that_learning_rate_to_the_bit(self, name: str) -> None:
        ours, by_hand, other = llama(), llama(), llama()
        optimizer = build(name, ours, {"head": 3.0, "qk": 2.0})
        groups = param_groups(
            by_hand, base_lr(name), {}, weight_decay=optimizer_entry(name).weight_decay or 0.0
        )
        for group in groups:
            group["lr"] = {"head": 3.0, "qk": 2.0}.get(group["block"], 1.0) * base_lr(name)
        train(name, ours, optimizer, range(4))
        train(name, by_hand, build_plainly(name, groups), range(4))
        train(name, other, build(name, other, {"head": 3.0}), range(4))
        assert differing(ours, by_hand) == []
        assert differing(ours, other)  # the ratio does something

    @pytest.mark.parametrize("name", keeps("plain"))
    def test_ratios_of_one_are_the_plain_optimizer_to_the_bit(self, name: str) -> None:
        ours, plain = llama(), llama()
        optimizer = build_plainly(name, plain.parameters())
        assert train(name, ours, build(name, ours, {}), range(5)) == train(name, plain, optimizer, range(5))
        assert differing(ours, plain) == []
        assert len(differing(ours, initial_llama())) > 5

    @pytest.mark.parametrize("name", keeps("dtype"))
    def test_types_and_shapes_stay(self, name: str) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            model = llama().to(dtype)
            optimizer = build(name, model)
            train(name, model, optimizer, range(3))
            shapes = [(t.shape, t.dtype, t.device) for t in tensors(optimizer)]
            train(name, model, optimizer, range(3, 8))
            assert [(t.shape, t.dtype, t.device) for t in tensors(optimizer)] == shapes
            assert {p.dtype for p in model.parameters()} == {dtype}
            assert all(t.device.type == "cpu" for t in tensors(optimizer))
            assert all(torch.isfinite(p).all() for p in model.parameters())

    @pytest.mark.parametrize("name", keeps("resume"))
    def test_a_resumed_run_goes_on_to_the_bit(self, name: str) -> None:
        def start(model: nn.Module) -> tuple[Optimizer, Any]:
            optimizer = build(name, model)
            return optimizer, cosine_schedule(optimizer, warmup_steps=2, total_steps=12, floor=0.0)

        model = llama()
        optimizer, schedule = start(model)
        train(name, model, optimizer, range(5), schedule)
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
        whole = train(name, model, optimizer, range(5, 10), schedule)

        file.seek(0)
        states = torch.load(file, weights_only=True)  # as Trainer does
        resumed = llama()
        fresh, fresh_schedule = start(resumed)
        for target, state in zip((resumed, fresh, fresh_schedule), states):
            target.load_state_dict(state)
        assert [g["names"] for g in fresh.param_groups] == [g["names"] for g in optimizer.param_groups]
        assert train(name, resumed, fresh, range(5, 10), fresh_schedule) == whole
        assert differing(resumed, model) == []

        forgetful = llama()
        forgetful.load_state_dict(states[0])
        assert train(name, forgetful, build(name, forgetful), range(5, 10)) != whole  # the state mattered

    @pytest.mark.parametrize("name", keeps("schedule"))
    def test_a_schedule_is_obeyed(self, name: str) -> None:
        model = llama()
        optimizer = build(name, model, decay="constant", weight_decay=0.1)
        schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=6, floor=0.0, warmup_start="zero")
        train(name, model, optimizer, range(1), schedule)
        assert differing(model, initial_llama()) == []  # the first update has learning rate 0
        train(name, model, optimizer, range(1, 4), schedule)
        assert len(differing(model, initial_llama())) > 5
        for group in optimizer.param_groups:
            peak = RATIOS.get(group["block"], 1.0) * base_lr(name)
            assert group["lr"] == pytest.approx(peak * (1 + math.cos(math.pi / 2)) / 2)
            assert group["lr"] * group["weight_decay"] == pytest.approx(group["lr"] / group["lr_ratio"] * 0.1)
        train(name, model, optimizer, range(4, 6), schedule)
        ended = copy.deepcopy(model)
        train(name, model, optimizer, range(6, 7))
        assert differing(model, ended) == []  # at learning rate 0 nothing moves, decay neither

    @pytest.mark.parametrize("name", keeps("split"))
    def test_works_on_a_split_model(self, name: str) -> None:
        model = split_fused(gpt2())
        before = copy.deepcopy(model.state_dict())
        optimizer = build(name, model)
        blocks = {group["block"] for group in optimizer.param_groups}
        assert {"qk", "vo"} <= blocks
        assert "qkv" not in blocks
        losses = train(name, model, optimizer, range(6))
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert "transformer.h.0.attn.c_attn.weight" in after
        moved = after["transformer.h.0.attn.c_attn.weight"] != before["transformer.h.0.attn.c_attn.weight"]
        assert all(part.any() for part in moved.chunk(3, dim=1))
        assert all(map(math.isfinite, losses))

    @pytest.mark.parametrize("name", keeps("accumulation"))
    def test_accumulated_gradients_are_one_large_batch(self, name: str) -> None:
        whole, parts = llama().double(), llama().double()
        optimizers = [build(name, model) for model in (whole, parts)]
        for i in range(3):
            ids = batch(i)
            backward(name, whole, ids)
            for half in ids.chunk(2):
                backward(name, parts, half, scale=0.5)
            for optimizer in optimizers:
                step(optimizer)
        for p, q in zip(whole.parameters(), parts.parameters()):
            # transformers rounds the logits to float32, Muon its matrices to bfloat16, and signs and Adam's first steps
            # blow up what is left.
            torch.testing.assert_close(p, q, rtol=0, atol=0.02 * base_lr(name))

    @pytest.mark.parametrize("name", keeps("measured"))
    def test_its_update_can_be_measured_without_a_trace(self, name: str) -> None:
        model, other = llama(), llama()
        optimizer, untouched = build(name, model), build(name, other)
        losses = train(name, model, optimizer, range(3)) + train(name, other, untouched, range(3))
        parameters = list(model.parameters())
        updates = stepped_updates(optimizer, parameters, [torch.ones_like(p) for p in parameters])
        assert all(update.abs().max() > 0 for update in updates)
        assert [set(group) for group in optimizer.param_groups] == [set(g) for g in untouched.param_groups]
        assert train(name, model, optimizer, range(3, 5)) == train(name, other, untouched, range(3, 5))
        assert losses[:3] == losses[3:]


def two_processes(rank: int, port: int, folder: str) -> None:
    """Every optimizer under DDP and FSDP2: what went wrong, by promise and name, and how far from one process's."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found: dict[tuple[str, str], Any] = {}
    for name in OPTIMIZERS:
        alone = llama()
        train(name, alone, build(name, alone), range(3))
        for promise in ("ddp", "fsdp2"):
            model: Any = llama()
            try:
                if promise == "ddp":
                    optimizer = build(name, model)
                    model = DistributedDataParallel(model)
                else:
                    fully_shard(model.model.layers[0])
                    fully_shard(model)
                    assert all(isinstance(p, DTensor) for p in model.parameters())
                    optimizer = build(name, model)
                for i in range(3):
                    backward(name, model, batch(i).chunk(2)[rank])
                    step(optimizer)
                if promise == "fsdp2":
                    get_optimizer_state_dict(model, optimizer)
            except Exception as error:
                found[promise, name] = f"{type(error).__name__}: {error}"
                continue
            whole = [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]
            off = [float((a - b).abs().max()) for a, b in zip(whole, alone.parameters())]
            both = [torch.empty_like(whole[0]) for _ in range(2)]
            distributed.all_gather(both, whole[0].contiguous())
            found[promise, name] = (max(off) / base_lr(name), torch.equal(*both))
    if rank == 0:
        torch.save(found, folder + "/found.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    folder = tmp_path_factory.mktemp("two")
    spawn(two_processes, (free_port(), str(folder)), 2)
    found: dict[tuple[str, str], Any] = torch.load(Path(folder) / "found.pt")
    return found


def same_as_alone(found: Any) -> None:
    assert not isinstance(found, str), found
    off, equal = found
    print(f"largest difference {off:g} base learning rates")
    assert equal
    assert off < 0.02  # Muon rounds to bfloat16, and how far depends on the processor: 0.0115 with AVX2 alone


@pytest.mark.parametrize("name", keeps("ddp"))
def test_two_processes_with_ddp_do_what_one_does(name: str, on_two_processes: Any) -> None:
    same_as_alone(on_two_processes["ddp", name])


@pytest.mark.parametrize("name", keeps("fsdp2"))
def test_two_processes_with_fsdp2_do_what_one_does(name: str, on_two_processes: Any) -> None:
    same_as_alone(on_two_processes["fsdp2", name])


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sophia"])
def test_two_processes_with_ddp_stay_bit_equal(name: str, on_two_processes: Any) -> None:
    _, equal = on_two_processes["ddp", name]
    assert equal


def test_the_exceptions_are_of_optimizers_that_there_are() -> None:
    assert all(set(names) <= set(OPTIMIZERS) for names in ALLOWED.values())
    assert isinstance(build("muon", llama()), Muon)
