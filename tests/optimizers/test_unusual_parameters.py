"""Parameters without elements or dimensions are trained and measured; sparse and complex ones are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blockwise_lr import (
    AdamMini,
    AutoRatios,
    classify,
    clip_grad_norm_by_block,
    cosine_schedule,
    measure_directional,
    measure_sharpness,
    param_groups,
)
from blockwise_lr.blocks import BlockMap
from blockwise_lr.errors import UnsupportedGradientError
from blockwise_lr.optim.nonfinite_report import nonfinite_gradients
from blockwise_lr.optimizers.muon import Muon
from blockwise_lr.optimizers.registry import OPTIMIZERS, build_optimizer
from blockwise_lr.sharpness.monitor import SharpnessMonitor

IDS = torch.randint(0, 16, (2, 6), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}
# torch's Adafactor divides by the number of elements.
TRAINS_EMPTY = [name for name in OPTIMIZERS if name not in ("sophia", "adafactor")]


class Unusual(nn.Module):
    """A small model, and beside it one parameter of any shape that scales what the embedding gives."""

    def __init__(self, extra: Tensor | None = None, *, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(16, 8, sparse=sparse)
        self.extra = None if extra is None else nn.Parameter(extra)
        self.ln_f, self.lm_head = nn.LayerNorm(8), nn.Linear(8, 16, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        hidden = self.wte(input_ids)
        if self.extra is not None:
            hidden = hidden * (1 + (self.extra.abs() if self.extra.is_complex() else self.extra).sum())
        logits = self.lm_head(self.ln_f(hidden))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def blocks_of(model: nn.Module, block: str = "other") -> BlockMap:
    trained = model.extra is not None and model.extra.requires_grad
    return classify(model, {"extra": block} if trained else {})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(**BATCH).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("block", ["norm", "ffn", "qk"])
@pytest.mark.parametrize("shape", [(0,), (4, 0), (2, 0, 4), ()])
@pytest.mark.parametrize("name", TRAINS_EMPTY)
def test_every_optimizer_trains_what_has_no_elements_or_no_dimensions(
    name: str, shape: tuple[int, ...], block: str
) -> None:
    model = Unusual(torch.full(shape, 0.5))
    optimizer = build_optimizer(name, model, 1e-3, {}, blocks=blocks_of(model, block))
    before = model.wte.weight.detach().clone()
    train(model, optimizer)
    assert not torch.equal(model.wte.weight, before)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    again = build_optimizer(name, model, 1e-3, {}, blocks=blocks_of(model, block))
    again.load_state_dict(optimizer.state_dict())
    train(model, again, 1)


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    block=st.sampled_from(["other", "norm", "ffn", "emb", "vo"]),
)
def test_adam_mini_trains_any_shape(shape: tuple[int, ...], block: str) -> None:
    model = Unusual(torch.full(shape, 0.1))
    optimizer = AdamMini(param_groups(model, 1e-3, {}, blocks=blocks_of(model, block)), lr=1e-3)
    train(model, optimizer)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("shape", [(0,), (4, 0), ()])
def test_they_are_measured_and_clipped(shape: tuple[int, ...]) -> None:
    model = Unusual(torch.full(shape, 0.5))
    blocks = blocks_of(model)
    for estimator in ("fisher", "empirical", "hutchinson"):
        assert measure_sharpness(model, [BATCH], estimator=estimator, blocks=blocks).per_parameter  # type: ignore[arg-type]
    model(**BATCH).loss.backward()
    for norm_type in (1.0, 2.0, float("inf")):
        norms = clip_grad_norm_by_block(model, 1e-3, blocks=blocks, norm_type=norm_type)
        assert all(bool(norm.isfinite()) for norm in norms.values())
    if 0 in shape:
        assert norms[blocks["extra"]] == 0


def stepped(name: str) -> Callable[[nn.Module], object]:
    def run(model: nn.Module) -> None:
        cls: Any = {"adam-mini": AdamMini, "muon": Muon}[name]
        train(model, cls(param_groups(model, 1e-3, {}, blocks=blocks_of(model)), lr=1e-3), 1)

    return run


def after_backward(use: Callable[[nn.Module], object]) -> Callable[[nn.Module], object]:
    def run(model: nn.Module) -> None:
        model(**BATCH).loss.backward()
        use(model)

    return run


def directional(model: nn.Module) -> object:
    optimizer = torch.optim.SGD(param_groups(model, 1e-3, {}, blocks=blocks_of(model)), lr=1e-3)
    return measure_directional(model, optimizer, [BATCH, BATCH], blocks=blocks_of(model))


def monitored(model: nn.Module) -> object:
    monitor = SharpnessMonitor(
        model, estimator="empirical", every=1, tokens_per_step=10, path=None, blocks=blocks_of(model)
    )
    return monitor.gradients(0)


def auto(model: nn.Module) -> None:
    optimizer = AdamMini(param_groups(model, 1e-3, {}, blocks=blocks_of(model)), lr=1e-3)
    schedule = cosine_schedule(optimizer, warmup_steps=1, total_steps=20)
    AutoRatios(optimizer, schedule)
    train(model, optimizer)


def measured(**options: Any) -> Callable[[nn.Module], object]:
    return lambda model: measure_sharpness(model, [BATCH], blocks=blocks_of(model), **options)


USES: dict[str, Callable[[nn.Module], object]] = {
    "clip": after_backward(lambda model: clip_grad_norm_by_block(model, 1.0, blocks=blocks_of(model))),
    "clip by groups": after_backward(
        lambda model: clip_grad_norm_by_block(
            model, 1.0, blocks=param_groups(model, 1e-3, {}, blocks=blocks_of(model))
        )
    ),
    "nonfinite": after_backward(lambda model: nonfinite_gradients(model, blocks_of(model))),
    "fisher": measured(),
    "empirical": measured(estimator="empirical"),
    "hutchinson": measured(estimator="hutchinson"),
    "finite differences": measured(estimator="hutchinson", hvp="finite-differences"),
    "histogram": measured(histogram=True),
    "directional": directional,
    "monitor": after_backward(monitored),
    "adam-mini": stepped("adam-mini"),
    "muon": stepped("muon"),
    "auto": auto,
}


@pytest.mark.parametrize("use", USES)
def test_a_sparse_gradient_is_refused_by_name_and_the_remedy_works(use: str) -> None:
    with pytest.raises(
        UnsupportedGradientError,
        match=r"does not support sparse gradients, and wte\.weight has one: make its embedding with sparse=False",
    ) as caught:
        USES[use](Unusual(sparse=True))
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RuntimeError)
    USES[use](Unusual(sparse=False))


@pytest.mark.parametrize("use", [use for use in USES if not use.startswith(("clip", "nonfinite"))])
def test_a_complex_parameter_is_refused_by_name_and_freezing_it_works(use: str) -> None:
    model = Unusual(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(
        UnsupportedGradientError, match=r"complex gradients, and extra has one: keep its real"
    ):
        USES[use](model)
    model = Unusual(torch.ones(3, dtype=torch.complex64))
    assert model.extra is not None
    model.extra.requires_grad_(False)
    USES[use](model)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    model = Unusual(torch.ones(3))
    extra, model.extra = model.extra, None  # is not used in the forward pass
    model.register_parameter("extra", extra)
    forward = model.forward
    model.forward = lambda **batch: unused(model, forward, batch)  # type: ignore[method-assign]
    for name in TRAINS_EMPTY:
        train(model, build_optimizer(name, model, 1e-3, {}, blocks=blocks_of(model)))
        assert bool((extra == 1).all())
    for estimator in ("fisher", "hutchinson"):
        report = measure_sharpness(model, [BATCH], estimator=estimator, blocks=blocks_of(model))  # type: ignore[arg-type]
        assert report.per_parameter["extra"].mean == 0


def unused(model: nn.Module, forward: Any, batch: dict[str, Tensor]) -> Any:
    """A forward pass that does without the extra parameter."""
    extra = model._parameters.pop("extra")
    model.extra = None
    try:
        return forward(**batch)
    finally:
        del model.extra
        model.register_parameter("extra", extra)
