"""The same numbers on one process and on two, replicated (DDP) and sharded (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from blockwise_lr import Block, SharpnessReport, classify, measure_sharpness
from sharpness.references import gpt2, llama, next_tokens, tokens
from support.processes import free_port, spawn

ESTIMATORS = {
    "fisher": {"probes": 2, "histogram": True},
    "empirical": {"estimator": "empirical", "histogram": True},
    "hutchinson": {"estimator": "hutchinson", "hvp": "double-backward"},
    "finite-differences": {"estimator": "hutchinson", "hvp": "finite-differences"},
}


# The global batches: two rows for the first process and three for the second, some labels of each ignored
# ------------------------------------------------------------------------------------------------------


def whole_batches() -> list[dict[str, torch.Tensor]]:
    batches = [tokens(rows=5, length=6, seed=seed) for seed in range(4)]
    for seed, batch in enumerate(batches):
        batch["labels"][0, seed : seed + 2] = -100
        batch["labels"][3, 1:] = -100
        batch["labels"][4, :3] = -100
    return batches


def share_of(rank: int, batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    rows = slice(0, 2) if rank == 0 else slice(2, 5)
    return [{name: value[rows] for name, value in batch.items()} for batch in batches]


def ignored_rows(rows: slice) -> list[dict[str, torch.Tensor]]:
    """Batches of which one process has no label that counts."""
    batches = whole_batches()
    for batch in batches:
        batch["labels"][rows] = -100
    return batches


def micro_batches() -> list[dict[str, torch.Tensor]]:
    """The whole batches in the order in which two processes with accumulate=2 have the samples."""
    one, two, three, four = whole_batches()
    return [
        {name: torch.cat([a[name], b[name]]) for name in a}
        for a, b in ((one, two), (three, four))
    ]  # fmt: skip


@cache
def _built() -> nn.Module:
    return gpt2(n_layer=2)


def model() -> nn.Module:
    return deepcopy(_built())


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its AdamW after a step on one process."""
    made = model()
    adam = torch.optim.AdamW(made.parameters(), lr=1e-3)
    made(**tokens(rows=5)).loss.backward()
    adam.step()
    return made, adam


# What each of the two processes does
# ------------------------------------------------------------------------------------------------------


def fully_sharded(made: nn.Module, *, root: bool = True, **options: Any) -> nn.Module:
    for layer in made.transformer.h if hasattr(made, "transformer") else made.model.layers:
        fully_shard(layer, **options)
    if root:
        fully_shard(made, **options)
        assert all(isinstance(parameter, DTensor) for parameter in made.parameters())
    return made


class OnlyLoss(nn.Module):
    """A model that keeps its logits to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.model = model()

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.model(**batch).loss


@dataclass
class Here:
    """One process: its share of the batches, and what it found."""

    rank: int
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def batches(self) -> list[dict[str, torch.Tensor]]:
        return share_of(self.rank, whole_batches())

    def measure(self, name: str, wrapped: nn.Module, own: list[Any] | None = None, **options: Any) -> None:
        report = measure_sharpness(wrapped, own or self.batches, **{"loss_fn": next_tokens, **options})
        self.found[name] = report.to_dict()

    def refuse(self, name: str, wrapped: nn.Module, own: list[Any] | None = None, **options: Any) -> None:
        with pytest.raises(ValueError) as caught:
            self.measure(name, wrapped, own, **options)
        self.found[name] = str(caught.value)


def two_processes(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    here = Here(rank)
    each_estimator(here, "ddp", DistributedDataParallel(model()))
    each_estimator(here, "fsdp", fully_sharded(model()))
    here.measure("ddp llama", DistributedDataParallel(llama()), loss_fn=None)
    here.measure("fsdp llama", fully_sharded(llama()), loss_fn=None)
    here.measure("distributed=True", model(), distributed=True, **ESTIMATORS["fisher"])
    a_running_training(here)
    other_ways_to_shard(here)
    what_cannot_be_sharded(here)
    torch.save(here.found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def each_estimator(here: Here, kind: str, wrapped: nn.Module) -> None:
    possible = {
        name: options for name, options in ESTIMATORS.items() if (kind, name) != ("fsdp", "hutchinson")
    }
    for name, options in possible.items():
        here.measure(f"{kind} {name}", wrapped, **options)
    here.measure(f"{kind} accumulate", wrapped, accumulate=2, probes=2)
    for empty, rows in enumerate([slice(0, 2), slice(2, 5)]):
        batches = share_of(here.rank, ignored_rows(rows))
        here.measure(f"{kind} no labels on {empty}", wrapped, batches, histogram=True)
    nothing = share_of(here.rank, ignored_rows(slice(0, 5)))
    for name, options in possible.items():
        here.refuse(f"{kind} no labels {name}", wrapped, nothing, **options)
    here.refuse(f"{kind} batches", wrapped, here.batches[: 2 + here.rank])
    here.measure(f"{kind} after errors", wrapped, **ESTIMATORS["fisher"])
    here.measure(f"{kind} own loss", wrapped, loss_fn=None)


def a_running_training(here: Here) -> None:
    """Gradients wait, an evaluation was last, and nothing of it is disturbed, not even by an exception."""
    made, adam = trained()
    options = {"estimator": "optimizer", "samples": 20, "histogram": True}
    here.measure("ddp optimizer", DistributedDataParallel(made), optimizer=adam, loss_fn=None, **options)
    moments = [adam.state[parameter] for parameter in made.parameters()]
    sharded = fully_sharded(deepcopy(made)).train()
    adam = torch.optim.AdamW(sharded.parameters(), lr=0.0)
    sharded(**here.batches[0]).loss.backward()
    adam.step()
    for parameter, moment in zip(sharded.parameters(), moments):
        whole = moment["exp_avg_sq"]
        adam.state[parameter]["exp_avg_sq"] = distribute_tensor(whole, parameter.device_mesh, [Shard(0)])
    here.measure("fsdp optimizer", sharded, optimizer=adam, loss_fn=None, **options)

    names = [name for name, _ in sharded.named_parameters()]
    before = [p.to_local().clone() for p in sharded.parameters()]
    waiting = [p.grad for p in sharded.parameters()]
    gradients = [gradient.to_local().clone() for gradient in waiting]

    def undisturbed() -> bool:
        parameters = list(sharded.parameters())
        return (
            [name for name, _ in sharded.named_parameters()] == names
            and all(torch.equal(p.to_local(), value) for p, value in zip(parameters, before))
            and all(p.grad is kept for p, kept in zip(parameters, waiting))
            and all(torch.equal(p.grad.to_local(), value) for p, value in zip(parameters, gradients))
            and all(module.training for module in sharded.modules())
        )

    for name in ("fisher", "empirical", "finite-differences"):
        with torch.no_grad():
            sharded(**here.batches[0])  # leaves the outermost module's parameters whole
            here.measure(f"fsdp in training {name}", sharded, **ESTIMATORS[name])
        assert undisturbed()
    for name, at in (("fisher", 1), ("finite-differences", 2), ("finite-differences", 3)):
        with pytest.raises(KeyboardInterrupt):
            here.measure("", sharded, loss_fn=breaking(at), **ESTIMATORS[name])
        assert undisturbed()
    here.measure("fsdp after exceptions", sharded, **ESTIMATORS["finite-differences"])


def breaking(at: int) -> Callable[[nn.Module, Any], Any]:
    """A loss_fn that is interrupted after its `at`-th forward pass."""
    calls = []

    def loss_fn(inner: nn.Module, batch: Any) -> Any:
        calls.append(1)
        found = next_tokens(inner, batch)
        if len(calls) == at:
            raise KeyboardInterrupt
        return found

    return loss_fn


def other_ways_to_shard(here: Here) -> None:
    layers = fully_sharded(model(), root=False)
    here.measure("layers only", layers, **ESTIMATORS["fisher"])
    here.measure("layers only empirical", layers, **ESTIMATORS["empirical"])
    for name, shape in (("hybrid", (2, 1)), ("hybrid of one replica", (1, 2))):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        here.measure(name, fully_sharded(model(), mesh=mesh), **ESTIMATORS["fisher"])
    second = fully_sharded(
        model(), shard_placement_fn=lambda p: Shard(p.ndim - 1)
    )  # where the fused parts are cut
    here.measure("second dimension", second, **ESTIMATORS["fisher"])
    undivided = fully_sharded(model())
    for module in undivided.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
    here.measure("undivided", undivided, **ESTIMATORS["fisher"])
    undivided.transformer.h[0].set_gradient_divide_factor(2.0)
    here.refuse("divisors", undivided)
    half = fully_sharded(model().float(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    here.measure("mixed precision", half, estimator="empirical")
    here.refuse("half differences", half, estimator="hutchinson")


def what_cannot_be_sharded(here: Here) -> None:
    here.measure("auto", sharded := fully_sharded(model()), estimator="hutchinson")
    here.refuse("double backward", sharded, **ESTIMATORS["hutchinson"])
    sharded.set_requires_gradient_sync(False)
    here.refuse("no synchronisation", sharded)
    lonely = OnlyLoss()
    fully_shard(lonely)
    here.refuse("only loss", lonely, loss_fn=None, blocks=classify(lonely))
    tensor_parallel = model()
    linear = tensor_parallel.transformer.h[0].mlp.c_fc
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("tensor", "data"))
    placements = [Shard(1), Replicate()]
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, placements))
    here.refuse("tensor and data parallel", tensor_parallel)
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("other", "alone"))["alone"]
    here.refuse("part of the processes", fully_sharded(model(), mesh=alone))
    here.refuse("fsdp1", FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu")))


# The tests compare what the two found with one process
# ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("processes")
    spawn(two_processes, (free_port(), str(folder)), 2)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    own = "ddp optimizer"  # each reads its own replica's, which may differ in the last bit
    same(second.pop(own), SharpnessReport.from_dict(first[own]))
    assert second == {
        name: value for name, value in first.items() if name != own
    }  # each has the whole answer
    return first


def same(found: dict[str, Any], expected: SharpnessReport, tolerance: float = 1e-10) -> None:
    report = SharpnessReport.from_dict(found)
    # Some gradients are 0 but for rounding, as those of the keys' biases.
    rounding = tolerance * max(abs(e.mean) for e in expected.per_parameter.values())
    assert {n: e.mean for n, e in report.per_parameter.items()} == pytest.approx(
        {n: e.mean for n, e in expected.per_parameter.items()}, rel=tolerance, abs=rounding
    )
    for block, estimate in expected.items():
        assert report[block].mean == pytest.approx(estimate.mean, rel=tolerance)
        assert report[block].numel == estimate.numel
        assert report.draws[block] == pytest.approx(expected.draws[block], rel=tolerance, abs=rounding)
    assert report.samples == expected.samples
    assert report.weights == expected.weights
    assert report.method == expected.method
    assert set(report.histograms) == set(expected.histograms)
    for block, histogram in expected.histograms.items():
        assert sum(report.histograms[block].counts) + report.histograms[block].zeros == report[block].numel
        # An element at the edge of a bin, or a gradient that is 0 but for rounding, may be counted elsewhere.
        assert difference(report.histograms[block], histogram) <= max(4, 0.02 * report[block].numel)


def difference(one: Any, other: Any) -> int:
    def counts(histogram: Any) -> dict[float, int]:
        starts = (round(histogram.start + i * histogram.width, 3) for i in range(len(histogram.counts)))
        return dict(zip(starts, histogram.counts))

    first, second = counts(one), counts(other)
    return sum(abs(first.get(at, 0) - second.get(at, 0)) for at in {*first, *second})


def alone(batches: list[Any] | None = None, **options: Any) -> SharpnessReport:
    return measure_sharpness(model(), batches or whole_batches(), loss_fn=next_tokens, **options)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_processes_find_what_one_finds(found, kind, name):
    if (kind, name) == ("fsdp", "hutchinson"):
        assert "have no double backward pass" in found["double backward"]
    else:
        tolerance = 1e-6 if name == "finite-differences" else 1e-10
        same(found[f"{kind} {name}"], alone(**ESTIMATORS[name]), tolerance)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_losses_and_norms_in_float32_are_measured_alike(found, kind):
    same(found[f"{kind} own loss"], measure_sharpness(model(), whole_batches()), 1e-5)
    same(found[f"{kind} llama"], measure_sharpness(llama(), whole_batches()), 1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_micro_batches_of_two_processes_are_one_batch(found, kind):
    # Samples are counted micro-batch by micro-batch, in each in the order of ranks.
    same(found[f"{kind} accumulate"], alone(micro_batches(), probes=2))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_errors_leave_nothing_behind(found, kind):
    same(found[f"{kind} after errors"], alone(**ESTIMATORS["fisher"]))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("empty", [0, 1])
def test_a_process_may_have_nothing_but_padding(found, kind, empty):
    rows = slice(0, 2) if empty == 0 else slice(2, 5)
    same(found[f"{kind} no labels on {empty}"], alone(ignored_rows(rows), histogram=True))


def test_a_model_that_is_replicated_without_ddp_is_measured_on_the_global_batch_when_told_so(found):
    same(found["distributed=True"], alone(**ESTIMATORS["fisher"]))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_optimizers_moments_are_counted_once(found, kind):
    made, adam = trained()
    expected = measure_sharpness(made, estimator="optimizer", optimizer=adam, samples=20, histogram=True)
    same(found[f"{kind} optimizer"], expected)


@pytest.mark.parametrize("name", ["fisher", "empirical", "finite-differences"])
def test_a_sharded_training_is_measured_and_not_disturbed(found, name):
    # That it was not disturbed is asserted by the processes.
    made, _ = trained()
    expected = measure_sharpness(made, whole_batches(), loss_fn=next_tokens, **ESTIMATORS[name])
    tolerance = 1e-6 if name == "finite-differences" else 1e-10
    same(found[f"fsdp in training {name}"], expected, tolerance)
    if name == "finite-differences":
        same(found["fsdp after exceptions"], expected, tolerance)


@pytest.mark.parametrize(
    "how", ["layers only", "hybrid", "hybrid of one replica", "second dimension", "undivided"]
)
def test_however_fully_shard_was_applied_the_numbers_are_the_same(found, how):
    same(found[how], alone(**ESTIMATORS["fisher"]))


def test_whole_parameters_beside_sharded_ones_are_summed_over_processes(found):
    same(found["layers only empirical"], alone(**ESTIMATORS["empirical"]))


def test_sharded_mixed_precision_is_right_to_a_few_percent(found):
    expected = measure_sharpness(model().float(), whole_batches(), loss_fn=next_tokens, estimator="empirical")
    report = SharpnessReport.from_dict(found["mixed precision"])
    for block, estimate in expected.items():
        assert report[block].mean == pytest.approx(estimate.mean, rel=0.05), block


def test_auto_takes_finite_differences_of_sharded_models(found):
    report = SharpnessReport.from_dict(found["auto"])
    assert report.method == "trace of the Hessian (finite-differences)"
    expected = alone(estimator="hutchinson", hvp="double-backward")
    assert report[Block.FFN].mean == pytest.approx(expected[Block.FFN].mean, rel=1e-6)


REFUSED = {
    "ddp batches": "only 1 of 2 processes have more than 2 batches; expected as many on each: set max_batches",
    "fsdp batches": "only 1 of 2 processes have more than 2 batches; expected as many on each: set max_batches",
    "double backward": 'sharded (DTensors) have no double backward pass: use hvp="finite-differences"',
    "half differences": "the forward pass computes in half precision (autocast inside the model, or fully_shard's "
    "MixedPrecisionPolicy)",
    "divisors": "modules differ in what set_gradient_divide_factor told them (1.0, 2.0): give all the same",
    "no synchronisation": "gradients are not exchanged between processes now: call model.set_requires_gradient_sync",
    "only loss": "backward() of the sharded model left no gradient: fully_shard notices the backward pass by",
    "tensor and data parallel": "transformer.h.0.mlp.c_fc.weight is sharded as S(1), R over 2 of 2 processes; expected "
    "fully_shard over all of them, or tensor parallelism alone over all of them (both together, pipeline and expert "
    "parallelism are not supported)",
    "part of the processes": "transformer.wte.weight is sharded as S(0) over 1 of 2 processes; expected fully_shard",
    "fsdp1": "FullyShardedDataParallel (FSDP1) flattens parameters, so their blocks cannot be told apart: use",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_wrong_on_several_processes_is_refused(found, what):
    assert REFUSED[what] in found[what]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_batch_without_labels_on_any_process_is_refused_on_all(found, name):
    for kind in ("ddp", "fsdp"):
        if (kind, name) != ("fsdp", "hutchinson"):
            assert "no label of the batch counts" in found[f"{kind} no labels {name}"]
