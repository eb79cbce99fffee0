"""measure_directional against dense references, and what it leaves behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockwise_lr import Block, classify, param_groups, split_fused
from blockwise_lr.optim.directional import measure_directional
from blockwise_lr.optim.directional_report import DirectionalReport
from blockwise_lr.optim.updates import stepped_updates, unit_updates
from blockwise_lr.pretrain.config import ModelConfig
from blockwise_lr.pretrain.models import build_model

TINY = {
    "llama": ModelConfig(hidden_size=8, layers=1, heads=2, vocab_size=11, context=8),
    "gpt2": ModelConfig("gpt2", hidden_size=8, layers=1, heads=2, vocab_size=11, context=8, tied=True),
}


def logits_and_labels(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64: transformers' own loss goes through float32."""
    return model(input_ids=batch).logits[:, :-1], batch[:, 1:]


def trained(family: str) -> tuple[nn.Module, torch.optim.Optimizer, list[torch.Tensor]]:
    """A model in float64 after some steps of AdamW, and batches that it has not seen."""
    torch.manual_seed(0)
    model = split_fused(build_model(TINY[family], seed=0).double()).train()
    optimizer = torch.optim.AdamW(param_groups(model, lr=2e-3), lr=2e-3)
    for _ in range(8):
        ids = torch.randint(11, (2, 6))
        logits, labels = logits_and_labels(model, ids)
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, [torch.randint(11, (2, 6)) for _ in range(3)]


# LLaMA's norms compute in float32 even in a float64 model: differences there need float32's move.
@pytest.mark.parametrize(
    ("family", "move", "slope_error", "error"), [("gpt2", None, 1e-9, 1e-5), ("llama", 1e-3, 1e-5, 2e-3)]
)
def test_signal_and_curvature_are_those_of_dense_autograd(family, move, slope_error, error) -> None:
    model, optimizer, (batch, *_) = trained(family)
    report = measure_directional(
        model, optimizer, [batch], loss_fn=logits_and_labels, hessian=True, move=move
    )
    model.eval()
    names, parameters = zip(*model.named_parameters())
    blocks = classify(model)
    updates = unit_updates(optimizer, parameters)
    assert updates is not None
    with sdpa_kernel(SDPBackend.MATH):  # the reference differentiates twice
        logits, labels = (t.flatten(0, 1) for t in logits_and_labels(model, batch))
    loss = nn.functional.cross_entropy(logits, labels)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    jacobian = [torch.autograd.grad(z, parameters, retain_graph=True) for z in logits.flatten()]
    along = {
        block: torch.stack(
            [
                sum((j * u).sum() for name, j, u in zip(names, row, updates) if blocks[name] is block)
                for row in jacobian
            ]
        ).reshape(logits.shape)
        for block in report
    }
    p = logits.softmax(-1).detach()
    for i, a in enumerate(report):
        slope = sum((g * u).sum() for name, g, u in zip(names, gradient, updates) if blocks[name] is a)
        assert report[a].signal == pytest.approx(slope.item(), rel=slope_error)
        scale = report[a].curvature
        product = torch.autograd.grad(slope, parameters, retain_graph=True, allow_unused=True)
        for j, b in enumerate(report):
            mean = (p * along[a]).sum(-1) * (p * along[b]).sum(-1)
            exact = ((p * along[a] * along[b]).sum(-1) - mean).mean()
            assert report.matrix[i][j] == pytest.approx(exact.item(), rel=error, abs=error * scale)
            hessian = sum(
                (h * u).sum()
                for name, h, u in zip(names, product, updates)
                if h is not None and blocks[name] is b
            )
            assert report.hessian is not None
            assert report.hessian[i][j] == pytest.approx(hessian.item(), rel=error, abs=error * scale)
    for slope_of in report.values():
        assert slope_of.noise < 1e-4 * slope_of.curvature


def test_model_and_optimizer_are_left_as_they_were() -> None:
    model, optimizer, batches = trained("gpt2")
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    measure_directional(model, optimizer, batches, loss_fn=logits_and_labels)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert all(torch.equal(v, after["state"][i][k]) for i, s in state["state"].items() for k, v in s.items())
    assert all(p.grad is None for p in model.parameters())


def test_an_update_seen_in_a_step_is_the_one_read_from_the_state() -> None:
    model, optimizer, _ = trained("llama")
    parameters = list(model.parameters())
    gradients = [torch.randn_like(p) for p in parameters]
    before = copy.deepcopy(model.state_dict())
    seen = stepped_updates(optimizer, parameters, gradients)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    optimizer.step()
    read = unit_updates(optimizer, parameters)
    assert read is not None
    for a, b in zip(seen, read):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_report_survives_json_and_says_what_it_means(tmp_path) -> None:
    model, optimizer, batches = trained("llama")
    report = measure_directional(model, optimizer, batches, loss_fn=logits_and_labels, step=8)
    report.to_json(tmp_path / "directional.json")
    assert DirectionalReport.from_json(tmp_path / "directional.json").to_dict() == report.to_dict()
    assert report[Block.VO].lr == pytest.approx(8e-3)
    assert all(slope.verdict for slope in report.values())
    assert len(report.eigenvalues) == len(report.joint_best_lr) == len(report)
