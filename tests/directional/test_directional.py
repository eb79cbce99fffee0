"""measure_directional against dense references, and what it leaves behind."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockwise_lr import (
    AdamMini,
    Block,
    DirectionalReport,
    build_optimizer,
    classify,
    measure_directional,
    merge_fused,
    param_groups,
    ratios_from_sharpness,
    split_fused,
)
from blockwise_lr.directional.directional_figure import directional_run_table, plot_directional, shown_report
from blockwise_lr.directional.slope import Slope
from blockwise_lr.directional.updates import (
    groups_by_parameter,
    stepped_updates,
    unit_updates,
)
from blockwise_lr.optim.ratios import MEASURED_RATIOS
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig
from directional.literal import before_last_update

TINY = {
    "llama": ModelConfig(hidden_size=8, layers=1, heads=2, vocab_size=11, context=8),
    "gpt2": ModelConfig("gpt2", hidden_size=8, layers=1, heads=2, vocab_size=11, context=8, tied=True),
}


def logits_and_labels(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64: transformers' own loss goes through float32."""
    return model(input_ids=batch).logits[:, :-1], batch[:, 1:]


def trained(
    family: str, kind: type[torch.optim.Optimizer] = torch.optim.AdamW
) -> tuple[nn.Module, torch.optim.Optimizer, list[torch.Tensor]]:
    """A model in float64 after some steps of the optimizer, and batches that it has not seen."""
    torch.manual_seed(0)
    model = split_fused(build_model(TINY[family], seed=0).double()).train()
    optimizer = kind(param_groups(model, lr=2e-3, ratios="paper"), lr=2e-3)
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
    with torch.no_grad():  # to where the update was taken
        for parameter, update, group in zip(parameters, updates, groups_by_parameter(optimizer, parameters)):
            parameter += group["lr"] * update
            parameter /= 1 - group["lr"] * group["weight_decay"]
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
        product = torch.autograd.grad(slope, parameters, retain_graph=True, allow_unused=True)
        for j, b in enumerate(report):
            scale = math.sqrt(report[a].curvature * report[b].curvature)
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


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam])
def test_inference_mode_and_a_step_of_numpy_change_nothing(kind, tmp_path) -> None:
    model, optimizer, batches = trained("gpt2", kind)
    expected = measure_directional(model, optimizer, batches, loss_fn=logits_and_labels, step=3)
    with torch.inference_mode():
        found = measure_directional(
            model, optimizer, batches, loss_fn=logits_and_labels, step=np.arange(3, 4)[0]
        )
    found.to_json(tmp_path / "directional.json")
    assert found.to_dict() == expected.to_dict()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamMini])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_update_seen_in_a_step_is_the_one_read_from_the_state(family, kind) -> None:
    model, optimizer, _ = trained(family, kind)
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


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamMini])
def test_an_update_that_has_been_taken_tells_what_it_told_before(kind) -> None:
    """Seen in a step that is undone, and read from the state after the same step: one measurement."""

    class Other(kind):  # whose state is not read
        pass

    model, optimizer, (first, *fresh) = trained("gpt2", kind)
    for group in optimizer.param_groups:
        group["weight_decay"] = 10.0  # no part of an update, but it moves the parameters
    other = Other(param_groups(model, lr=2e-3, ratios="paper"), lr=2e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = measure_directional(model, other, [first, *fresh], loss_fn=logits_and_labels)
    model.eval()  # as a measurement does
    logits, labels = logits_and_labels(model, first)
    nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    optimizer.step()
    after = measure_directional(model, optimizer, fresh, loss_fn=logits_and_labels)
    for block, slope in before.items():
        assert after[block].signal == pytest.approx(slope.signal, rel=1e-6, abs=1e-9)
        assert after[block].curvature == pytest.approx(slope.curvature, rel=1e-5)
        assert after[block].best_lr == pytest.approx(slope.best_lr, rel=1e-5)


def test_a_step_to_the_lowest_loss_along_an_update_was_about_right() -> None:
    """And not one that could not be shorter: its signal is gone where it led to."""
    model, optimizer, batches = trained("gpt2")
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    parameters = list(model.parameters())
    updates, groups = unit_updates(optimizer, parameters), groups_by_parameter(optimizer, parameters)
    assert updates is not None
    with before_last_update(parameters, updates, groups):
        start = [parameter.detach().clone() for parameter in parameters]
    found = measure_directional(model, optimizer, batches, loss_fn=logits_and_labels)
    blocks = classify(model)
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():  # FFN alone moves, as far as was found best for it
        for name, parameter, value, update, group in zip(names, parameters, start, updates, groups):
            group["lr"] = found[Block.FFN].best_lr if blocks[name] is Block.FFN else 0.0
            parameter.copy_(value - group["lr"] * update)
    again = measure_directional(model, optimizer, batches, loss_fn=logits_and_labels)
    assert again[Block.FFN].factor == pytest.approx(1.0, rel=1e-6)


def test_a_report_survives_json_and_says_what_it_means(tmp_path) -> None:
    model, optimizer, batches = trained("llama")
    report = measure_directional(model, optimizer, batches, loss_fn=logits_and_labels, step=8)
    report.to_json(tmp_path / "directional.json")
    assert DirectionalReport.from_json(tmp_path / "directional.json").to_dict() == report.to_dict()
    assert report[Block.VO].lr == pytest.approx(8e-3)
    assert all(slope.verdict for slope in report.values())
    assert len(report.eigenvalues) == len(report.joint_best_lr) == len(report)


def report_of(**slopes: dict[str, float]) -> DirectionalReport:
    """Slopes by block, each with what is given and otherwise lr = best_lr = 1, without error."""
    usual = {"lr": 1.0, "signal": 1.0, "signal_stderr": 0.0, "curvature": 1.0, "curvature_stderr": 0.0,
             "best_lr": 1.0, "best_lr_stderr": 0.0, "noise": 0.0, "numel": 1,
             "best_lr_beside": 1.0, "best_lr_beside_stderr": 0.0}  # fmt: skip
    blocks = {Block(name): Slope(**{**usual, **given}) for name, given in slopes.items()}
    identity = [[float(a is b) for b in blocks] for a in blocks]
    return DirectionalReport(blocks, matrix=identity, hessian=None, samples=1, batches=2)


def test_a_quadratic_gives_its_known_answer() -> None:
    """Logistic regression at 0: p = 1/2, so G = x'x / 4 and g = -x'(y - 1/2), along plain SGD's update g."""

    class Logistic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.zeros_like(x), x @ self.weight], dim=1)

    model, x = Logistic(), torch.tensor([[2.0], [2.0]], dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = (x, torch.tensor([1, 1]))
    blocks = classify(model, {"weight": Block.FFN})
    report = measure_directional(model, optimizer, [batch, batch], blocks=blocks)
    slope = report[Block.FFN]
    assert slope.signal == pytest.approx(1.0)  # g = u = -2 (1 - 1/2) = -1
    assert slope.curvature == pytest.approx(1.0, rel=1e-6)  # x^2 / 4
    assert slope.best_lr == pytest.approx(1.0, rel=1e-6)
    assert slope.lr == 0.1
    assert report.samples == 2  # the first batch went into the step


def test_the_whole_matrix_gives_eigenvalues_and_the_joint_minimiser() -> None:
    model, optimizer, batches = trained("gpt2")
    report = measure_directional(model, optimizer, batches, loss_fn=logits_and_labels)
    matrix = np.array(report.matrix)
    signal = np.array([slope.signal for slope in report.values()])
    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-12)
    joint = np.array(list(report.joint_best_lr.values()))
    np.testing.assert_allclose(matrix @ joint, signal, rtol=1e-6, atol=1e-9)
    largest_first = sorted(
        np.linalg.svd(matrix, compute_uv=False), reverse=True
    )  # C is positive semidefinite
    np.testing.assert_allclose(report.eigenvalues, largest_first, rtol=1e-6, atol=1e-9 * largest_first[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("batches", [1, 3])
def test_a_block_that_does_not_move_the_logits_is_told_as_such(batches: int) -> None:
    report = DirectionalReport.from_draws(
        [Block.FFN, Block.ROUTER], signals=[[1.0, 0.0]] * batches, curvatures=[[[2.0, 0.0], [0.0, 0.0]]] * batches,
        noise=np.full((batches, 2), 1e-9), samples=[8] * batches, hessians=None, lrs=[0.5, 0.1],
        ratios=[1.0, 1.0], numels=[1, 1], step=None,
    )  # fmt: skip
    assert report[Block.ROUTER].verdict == "no effect on logits"
    assert report[Block.FFN].best_lr == report[Block.FFN].best_lr_beside == 0.5
    assert report[Block.FFN].verdict == ("about right" if batches > 1 else "one batch: no error bars")


def test_a_block_without_curvature_leaves_the_others_theirs() -> None:
    still = report_of(norm={"signal": 0.0, "curvature": 0.0}, ffn={"signal": 3.0})
    flat = replace(still, matrix=[[0.0, 0.0], [0.0, 2.0]])
    assert flat.joint_best_lr == pytest.approx({Block.NORM: 0.0, Block.FFN: 1.5})


def test_standard_errors_cover_what_they_should() -> None:
    """Signals and curvatures of 4 000 measurements of 16 batches: lr* is within two standard errors of 2 in 95 %."""
    rng = np.random.default_rng(0)
    within = 0
    for _ in range(4000):
        common = rng.normal(size=16)  # both are of the same batches
        signals = torch.from_numpy(2 + common + rng.normal(size=16))[:, None]
        curvatures = torch.from_numpy(1 + 0.1 * common + 0.1 * rng.normal(size=16))[:, None, None]
        report = DirectionalReport.from_draws(
            [Block.FFN], signals=signals, curvatures=curvatures, noise=torch.zeros(16, 1), samples=[8] * 16,
            hessians=None, lrs=[1.0], ratios=[1.0], numels=[1], step=None,
        )  # fmt: skip
        slope = report[Block.FFN]
        within += abs(slope.best_lr - 2) < 2 * slope.best_lr_stderr
    assert 0.91 < within / 4000 < 0.97  # of Student's t with 15 degrees of freedom: 0.936


def test_noise_is_what_float32_adds_to_the_curvature() -> None:
    """The more, the less the parameters are moved: the difference to float64 is of that size."""
    model, optimizer, batches = trained("gpt2")
    exact = measure_directional(model, optimizer, batches, loss_fn=logits_and_labels)
    narrow = copy.deepcopy(model).float()
    same = torch.optim.AdamW(param_groups(narrow, lr=2e-3, ratios="paper"), lr=2e-3)
    of = dict(zip(model.parameters(), narrow.parameters()))
    for parameter, state in optimizer.state.items():
        same.state[of[parameter]] = {k: v.float() for k, v in state.items()}
    for move in (1e-3, 1e-5, 1e-7):
        rough = measure_directional(narrow, same, batches, loss_fn=logits_and_labels, move=move)
        for block, slope in rough.items():
            true = exact[block].curvature
            # Rounding adds its square, and a product with the true change whose sign is any.
            bound = 2 * (slope.noise + math.sqrt(slope.noise * true)) + 1e-3 * true  # and truncation
            assert abs(slope.curvature - true) < bound, (move, block)
            if abs(slope.curvature - true) > true:  # which the verdict then says
                assert slope.noise > 0.1 * abs(slope.curvature), (move, block)
    assert (
        max(slope.noise / exact[block].curvature for block, slope in rough.items()) > 0.1
    )  # at 1e-7 it shows


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_compiled_model_and_any_attention_kernel_give_one_answer(attention) -> None:
    model, optimizer, batches = trained("llama")  # sdpa
    expected = measure_directional(model, optimizer, batches, loss_fn=logits_and_labels, move=1e-3)
    model.set_attn_implementation(attention)
    compiled = torch.compile(model, backend="aot_eager")  # what it wraps is measured
    found = measure_directional(compiled, optimizer, batches, loss_fn=logits_and_labels, move=1e-3)
    for block, slope in expected.items():
        assert found[block].signal == pytest.approx(slope.signal, rel=1e-4, abs=1e-6)
        assert found[block].curvature == pytest.approx(slope.curvature, rel=1e-3)


@pytest.mark.parametrize("frozen", ["", "transformer.wpe", "transformer.h"])
def test_half_precision_parameters_are_measured_on_a_float32_copy(frozen: str) -> None:
    torch.manual_seed(0)
    model = split_fused(build_model(TINY["gpt2"], seed=0)).bfloat16()
    left = model.get_submodule(frozen).parameters() if frozen else []
    for parameter in left:
        parameter.requires_grad_(False).grad = torch.ones_like(parameter)
    model.lm_head.register_buffer("scale", torch.ones(11, dtype=torch.bfloat16))
    model.lm_head.register_forward_hook(lambda head, inputs, logits: logits * head.scale[None])
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2), lr=1e-2)
    for _ in range(3):
        ids = torch.randint(11, (2, 6))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ids = torch.randint(11, (4, 6))
    batch = {"input_ids": ids, "labels": ids}
    before = copy.deepcopy(model.state_dict())
    found = measure_directional(model, optimizer, batch)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.dtype is torch.bfloat16 for p in (*model.parameters(), *model.buffers()))
    assert all(p.requires_grad or torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    moved = [p for p in model.parameters() if p.requires_grad]
    updates = unit_updates(optimizer, moved)
    wide = copy.deepcopy(model).float()
    same = torch.optim.AdamW(param_groups(wide, lr=1e-2), lr=1e-2)
    for parameter, other in zip(moved, (p for p in wide.parameters() if p.requires_grad)):
        same.state[other] = {k: v.float() for k, v in optimizer.state[parameter].items()}
    assert updates is not None
    expected = measure_directional(wide, same, batch)
    for block, slope in expected.items():
        assert found[block].curvature == pytest.approx(slope.curvature, rel=1e-4)
        assert found[block].signal == pytest.approx(slope.signal, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["nadamw", "lion", "muon", "soap"])
def test_a_step_of_half_precision_parameters_is_seen_in_float32_and_undone(name) -> None:
    torch.manual_seed(0)
    model = split_fused(build_model(TINY["gpt2"], seed=0)).bfloat16()
    optimizer = build_optimizer(name, model, lr=1e-2)
    for _ in range(3):
        ids = torch.randint(11, (2, 6))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    batches = [
        {"input_ids": ids, "labels": ids} for ids in (torch.randint(11, (4, 6)), torch.randint(11, (4, 6)))
    ]
    report = measure_directional(model, optimizer, batches)
    assert all(slope.curvature > 0 for slope in report.values())
    flat, after = (
        torch.utils._pytree.tree_leaves(s) for s in (before, [model.state_dict(), optimizer.state_dict()])
    )
    assert len(flat) == len(after)
    for a, b in zip(flat, after):
        assert torch.equal(a, b) and a.dtype is b.dtype if isinstance(a, torch.Tensor) else a == b


def test_parts_of_a_fused_weight_that_was_not_split_are_told_apart() -> None:
    model, optimizer, batches = trained("gpt2")
    for group in optimizer.param_groups:
        group["lr"] = 2e-3  # of a fused weight, all parts have one
    split = measure_directional(model, optimizer, batches, loss_fn=logits_and_labels)
    fused = merge_fused(model)
    decay = optimizer.param_groups[0]["weight_decay"]
    plain = torch.optim.AdamW(fused.parameters(), lr=2e-3, weight_decay=decay)
    names = dict(fused.named_parameters())
    old = {
        n: s
        for g in optimizer.param_groups
        for n, s in zip(g["names"], map(optimizer.state.get, g["params"]))
    }
    for name, parameter in names.items():
        if name in old:
            plain.state[parameter] = old[name]
            continue
        stem, _, leaf = name.rpartition(".")
        parts = [old[f"{stem}.parametrizations.{leaf}.original{i}"] for i in range(3)]
        plain.state[parameter] = {
            "step": parts[0]["step"],
            **{k: torch.cat([part[k] for part in parts], -1) for k in ("exp_avg", "exp_avg_sq")},
        }
    whole = measure_directional(fused, plain, batches, loss_fn=logits_and_labels)
    assert whole.keys() == split.keys()
    for block, slope in split.items():
        assert whole[block].curvature == pytest.approx(slope.curvature, rel=1e-6)
        assert whole[block].signal == pytest.approx(slope.signal, rel=1e-9)


def test_what_cannot_be_measured_is_refused() -> None:
    model, optimizer, batches = trained("llama")
    loss = {"loss_fn": logits_and_labels}
    with pytest.raises(ValueError, match="batches is empty; expected at least one"):
        measure_directional(model, optimizer, [], **loss)
    with pytest.raises(ValueError, match=r"move is 0\.0; expected a number above 0"):
        measure_directional(model, optimizer, batches, move=0.0, **loss)
    with pytest.raises(ValueError, match="max_batches is 0; expected 1 or more"):
        measure_directional(model, optimizer, batches, max_batches=0, **loss)
    fresh = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(
        ValueError, match=r"AdamW has no state for .* number 0 .*train first, or freeze the parameter"
    ):
        measure_directional(model, fresh, batches, **loss)
    other, _, _ = trained("gpt2")
    with pytest.raises(ValueError, match="trainable parameters are not in the optimizer"):
        measure_directional(other, optimizer, batches, **loss)
    resting = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(ValueError, match="a group of SGD has learning rate 0, so a step shows no update"):
        measure_directional(model, resting, batches, **loss)
    with pytest.raises(ValueError, match="expected two batches or more, the first for the optimizer's step"):
        measure_directional(model, torch.optim.SGD(model.parameters(), lr=1e-3), [], **loss)


def test_verdicts_name_the_direction_and_the_factor() -> None:
    def moving(best: float, error: float = 0.0, **more: float) -> dict[str, float]:
        return {"best_lr_beside": best, "best_lr_beside_stderr": error, **more}

    report = report_of(
        norm=moving(20.0, 1.0),
        vo=moving(0.1, 0.01),
        qk=moving(-1.0, 0.1),
        ffn=moving(1.0, 0.1),
        emb=moving(2.0, 2.0),
        head=moving(1.0, math.nan),
        pos=moving(0.35, 0.2),
        other=moving(1.0, 0.1, noise=0.2),
    )
    assert {block.value: slope.verdict for block, slope in report.items()} == {
        "norm": "could go up x20",
        "vo": "overshoots: x0.1 is right",
        "qk": "raises the loss",
        "ffn": "about right",
        "emb": "not clear: more batches",
        "head": "one batch: no error bars",
        "pos": "not clear: more batches",
        "other": "not clear: rounding",
    }


def test_a_block_has_the_signal_that_the_moving_others_leave() -> None:
    """C = [[2, 1], [1, 4]], s = (3, 6), each at 1/2: after FFN's half a step, EMB's signal is 3 - 1/2."""
    draws = {
        "signals": torch.tensor([[3.0, 6.0], [3.0, 6.0]]).double(),
        "curvatures": torch.tensor([[[2.0, 1.0], [1.0, 4.0]]] * 2).double(),
        "noise": torch.zeros(2, 2),
        "samples": [1, 1],
        "hessians": None,
    }
    report = DirectionalReport.from_draws(
        [Block.EMB, Block.FFN], **draws, lrs=[0.5, 0.5], ratios=[1.0, 1.0], numels=[1, 1], step=None
    )
    assert [slope.best_lr for slope in report.values()] == [1.5, 1.5]
    assert [slope.best_lr_beside for slope in report.values()] == [1.25, 1.375]
    assert [slope.best_lr_beside_stderr for slope in report.values()] == [0.0, 0.0]
    # All together: where each is right while the others move at theirs.
    assert report.joint_best_lr == pytest.approx({Block.EMB: 6 / 7, Block.FFN: 9 / 7})


def test_the_ratios_of_one_report_are_those_of_measured() -> None:
    report = report_of(
        norm={"lr": 2.0, "best_lr_beside": 80.0, "ratio": 2.0, "best_lr_beside_stderr": 4.0},
        emb={"lr": 1.0, "best_lr_beside": 2.5},
        vo={"best_lr_beside": -3.0},
        qk={"best_lr_beside": 0.1},
    )
    ratios = report.ratios()
    assert dict(ratios_from_sharpness(report)) == dict(ratios)
    assert set(ratios.undetermined) == {*report} - {ratios.anchor}
    over = {block: MEASURED_RATIOS[block] / MEASURED_RATIOS[ratios.anchor] for block in report}
    assert dict(ratios) == over
    with pytest.raises(ValueError, match="were measured at learning rate 0, from which no ratio follows"):
        ratios_from_sharpness(report_of(norm={"lr": 0.0}))


def test_a_damaged_report_is_refused_with_its_path(tmp_path) -> None:
    path = tmp_path / "directional.json"
    path.write_text('{"kind": "directional", "format": 1}')
    with pytest.raises(ValueError, match=r"directional\.json: not a directional report, or a damaged one"):
        DirectionalReport.from_json(path)
    report_of(norm={}).to_json(path)
    path.write_text(path.read_text().replace("best_lr_beside", "best_lr_before"))
    with pytest.raises(ValueError, match="an earlier version measured after the update: measure again"):
        DirectionalReport.from_json(path)
    path.write_text('{"kind": "other"}')
    with pytest.raises(ValueError, match=r'not a directional report; expected "kind": "directional"'):
        DirectionalReport.from_json(path)
    with pytest.raises(KeyError, match="no block 'vo' in this report; it has norm"):
        report_of(norm={})["vo"]


def test_the_figure_shows_a_run_or_a_single_step(tmp_path) -> None:
    reports = [
        replace(report_of(norm={"best_lr": 9.0}, vo={"best_lr": -1.0, "best_lr_beside": -1.0}), step=step)
        for step in (10, 20)
    ]
    assert plot_directional(reports, tmp_path / "run.png").stat().st_size > 10_000
    assert reports[0].plot(tmp_path / "one.svg").exists()
    with pytest.raises(ValueError, match="no reports; expected one or more"):
        plot_directional([], tmp_path / "none.png")


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    norm = {"lr": 2e-4, "best_lr": 0.09, "best_lr_beside": 0.077, "best_lr_beside_stderr": 0.008}
    report = report_of(norm=norm, vo={"best_lr_beside": -9.0, "best_lr_beside_stderr": 1.0})
    console = Console(width=80, file=io.StringIO())
    console.print(report.table())
    shown = console.file.getvalue()
    assert "2.00e-04 │ 9.0e-02 │ 7.7e-02 ± 8.0e-03 │ could go up x20 or more" in " ".join(shown.split())
    assert "│ raises the loss " in shown
    assert len(shown.strip().splitlines()) == 10
    assert max(map(len, shown.splitlines())) <= 80


def test_the_table_of_a_run_fits_too_and_the_step_that_is_shown_has_the_highest_rate() -> None:
    high, low = (
        replace(
            report_of(norm={"lr": lr, "best_lr_beside": 2e3}, ffn={"lr": lr, "best_lr_beside": -1.0}),
            step=step,
        )
        for lr, step in ((1.0, 10_000), (0.1, 50_000))
    )
    assert shown_report([high, low]) is high
    console = Console(width=80, file=io.StringIO())
    console.print(directional_run_table([high] * 15 + [low] * 5))
    shown = console.file.getvalue()
    assert shown.count("10,000") == 4
    assert shown.count("50,000") == 2
    assert "│ norm │ >x20" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80
    assert " ".join(shown.split()).count("│ - ") == 6


class Flat(nn.Module):
    """Logits of the predicted tokens, one row each: what curvlinops differentiates."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids).logits[:, :-1].flatten(0, 1)


def test_curvlinops_has_the_same_matrix_over_blocks() -> None:
    from curvlinops import GGNLinearOperator

    model, optimizer, batches = trained("gpt2")
    report = measure_directional(model, optimizer, batches, loss_fn=logits_and_labels)
    model.eval()
    names, parameters = zip(*model.named_parameters())
    updates, blocks = unit_updates(optimizer, parameters), classify(model)
    assert updates is not None
    groups = groups_by_parameter(optimizer, parameters)
    along = torch.stack(
        [
            torch.cat([(u * (blocks[name] is block)).flatten() for name, u in zip(names, updates)])
            for block in report
        ],
        dim=1,
    )
    data = [(ids, ids[:, 1:].flatten()) for ids in batches]
    with (
        before_last_update(parameters, updates, groups),
        sdpa_kernel(SDPBackend.MATH),
    ):  # its products go forwards
        matrix = GGNLinearOperator(
            Flat(model), nn.CrossEntropyLoss(), list(parameters), data, check_deterministic=False
        )
        expected = along.T @ (matrix @ along)
    torch.testing.assert_close(
        torch.tensor(report.matrix, dtype=torch.float64),
        expected.detach(),
        rtol=1e-5,
        atol=1e-5 * float(expected.abs().max()),
    )
