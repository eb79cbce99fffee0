"""Optimizers by name and by import path: what is known of them, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from blockwise_lr import DEFAULT_RATIOS, Block
from blockwise_lr.optimizers.registry import OPTIMIZERS, build_optimizer, optimizer_class, optimizer_entry
from support.cases import llama

NEEDS_PACKAGE = [name for name in OPTIMIZERS if optimizer_entry(name).path.startswith("pytorch_optimizer")]


def test_adamw_and_nadamw_mean_what_they_always_did() -> None:
    assert optimizer_class("adamw") == (torch.optim.AdamW, {"betas": (0.9, 0.95), "eps": 1e-8, "fused": True})
    assert optimizer_class("nadamw") == (
        torch.optim.NAdam,
        {"betas": (0.9, 0.95), "eps": 1e-8, "decoupled_weight_decay": True},
    )
    assert optimizer_class("adamw", beta1=0.8, beta2=0.9, eps=1e-6)[1] == {
        "betas": (0.8, 0.9), "eps": 1e-6, "fused": True,
    }  # fmt: skip


def test_an_optimizer_has_its_own_defaults_and_takes_others() -> None:
    pytest.importorskip("pytorch_optimizer")
    model = llama()
    own = build_optimizer("lion", model, 1e-4)
    assert {(g["betas"], g["weight_decay"]) for g in own.param_groups} == {((0.95, 0.98), 1.0)}
    assert {g["block"]: g["lr"] for g in own.param_groups} == {
        group["block"]: pytest.approx(DEFAULT_RATIOS.get(Block(group["block"]), 1) * 1e-4)
        for group in own.param_groups
    }
    given = build_optimizer("lion", model, 1e-4, {}, weight_decay=0.3, betas=(0.9, 0.99), no_decay=["norm"])
    assert {(g["betas"], g["weight_decay"]) for g in given.param_groups} == {
        ((0.9, 0.99), 0.3),
        ((0.9, 0.99), 0.0),
    }
    assert optimizer_class("ademamix", beta1=0.8)[1]["betas"] == (0.8, 0.999, 0.9999)


def test_weight_decay_by_block_keeps_the_default_of_the_optimizer_for_the_others() -> None:
    def decays(name: str, **settings: Any) -> dict[str, float]:
        return {
            g["block"]: g["weight_decay"]
            for g in build_optimizer(name, llama(), 1e-3, **settings).param_groups
        }

    assert decays("sgd", weight_decay={"norm": 0.3}).items() >= {"norm": 0.3, "ffn": 0.0}.items()
    assert decays("adan", weight_decay={"norm": 0}).items() >= {"norm": 0.0, "ffn": 0.02}.items()
    assert decays("torch.optim:Adafactor", weight_decay="constant")["norm"] == 0.0
    assert set(decays("adan", weight_decay="coupled").values()) == {0.02}
    assert set(decays("torch.optim:Rprop", weight_decay={"norm": 0}).values()) == {0.0}
    for given in (0.1, {"norm": 0.1}):
        with pytest.raises(ValueError, match=r"optimizer torch.optim:Rprop takes no weight_decay \(it is "):
            build_optimizer("torch.optim:Rprop", llama(), 1e-3, weight_decay=given)


def test_any_other_optimizer_goes_by_its_import_path() -> None:
    optimizer = build_optimizer("torch.optim:RAdam", llama(), 1e-3, {"emb": 3.0}, betas=(0.9, 0.95))
    assert type(optimizer) is torch.optim.RAdam
    assert optimizer.param_groups[0]["weight_decay"] == 0.0  # RAdam's own default
    assert {g["betas"] for g in optimizer.param_groups} == {(0.9, 0.95)}
    entry = optimizer_entry("torch.optim:RAdam")
    assert (entry.betas, entry.eps, entry.weight_decay, entry.lr_factor) == ((0.9, 0.999), 1e-8, 0.0, None)
    assert optimizer_entry("torch.optim:Rprop").weight_decay is None


def test_a_class_beside_the_user_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_the_user.py").write_text("import torch\nclass Mine(torch.optim.SGD): pass\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert optimizer_class("beside_the_user:Mine")[0].__name__ == "Mine"
    assert sys.path == path


@pytest.mark.parametrize("name", NEEDS_PACKAGE)
def test_a_missing_package_is_named_with_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    message = (
        f"optimizer {name} needs pytorch_optimizer, which is not installed: pip install .*\\[optimizers\\]'"
    )
    with pytest.raises(ModuleNotFoundError, match=message):
        optimizer_class(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "adamm",
            {},
            "no optimizer named 'adamm'; there are adamw, nadamw, .*lion.* by its import path, module:Class",
        ),
        ("torch.optim:Adamm", {}, "optimizer torch.optim:Adamm: .*Adamm.*; expected module:Class, such as"),
        ("no_such_module:A", {}, "optimizer no_such_module:A: No module named 'no_such_module'"),
        (":Adam", {}, "optimizer :Adam: .*; expected module:Class"),
        (
            "torch.nn:Linear",
            {},
            "optimizer torch.nn:Linear is the class Linear; expected a subclass of torch.optim",
        ),
        ("torch:randn", {}, "optimizer torch:randn is a .*; expected a subclass of torch.optim.Optimizer"),
        ("sgd", {"beta1": 0.9}, r"optimizer sgd takes no beta1 \(it is 0.9\): leave it out"),
        ("adafactor", {"eps": 1e-8}, r"optimizer adafactor takes no eps \(it is 1e-08\)"),
        ("lion", {"eps": 1e-8}, "optimizer lion takes no eps"),
    ],
)
def test_what_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        optimizer_class(name, **options)
    assert "\n" not in str(error.value)


def test_the_page_shows_the_defaults_there_are() -> None:
    def spelled(value: float | None) -> str:
        return "-" if value is None else format(value, "g")

    page = (Path(__file__).parents[2] / "docs/how-to/optimizers.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "| `" in line
    ]
    shown = {row[0].strip("`"): row[1:] for row in rows if len(row) == 8}
    for name in OPTIMIZERS:
        entry = optimizer_entry(name)
        assert shown.pop(name) == [
            f"`{entry.path}`",
            ", ".join(map(spelled, entry.betas)) if entry.betas else "-",
            spelled(entry.eps),
            spelled(entry.weight_decay),
            spelled(entry.lr_factor),
            entry.reference,
            entry.note or "-",
        ]
        assert f'build_optimizer("{name}", model' in page
    assert not shown


def test_an_option_that_would_be_swallowed_is_refused() -> None:
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ValueError, match="optimizer lion takes no eps; it takes lr, betas, weight_decay"):
        build_optimizer("lion", llama(), 1e-4, eps=1e-8)
    with pytest.raises(ValueError, match="optimizer torch.optim:Rprop takes no weight_decay"):
        build_optimizer("torch.optim:Rprop", llama(), 1e-4, weight_decay=0.1)


@pytest.mark.parametrize("period", [1, 10])
def test_sophia_in_a_plain_loop_says_what_it_needs_and_then_works(period: int) -> None:
    pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    model = nn.ModuleDict({"wte": nn.Embedding(16, 4), "ln_f": nn.LayerNorm(4)})
    optimizer = build_optimizer("sophia", model, 5e-2, update_period=period)

    def loss() -> torch.Tensor:
        return model["ln_f"](model["wte"](torch.arange(8))).square().sin().sum()

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(3):
        optimizer.zero_grad()
        loss().backward()
        if step % period == 0:
            with pytest.raises(RuntimeError, match=r"optimizer sophia .*loss\.backward\(create_graph=True\)"):
                optimizer.step()
            optimizer.zero_grad()
            loss().backward(create_graph=True)
        optimizer.step()
    assert all(not p.equal(before[name]) for name, p in model.named_parameters())

    optimizer.zero_grad()
    loss().backward()
    optimizer.step(hessian=[torch.ones_like(p) for group in optimizer.param_groups for p in group["params"]])
