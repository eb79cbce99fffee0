"""The study of Muon: one run is a user's own loop, its queue ends, and its tables follow from the runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blockwise_lr import Muon, param_groups

STUDY = Path(__file__).parents[2] / "studies" / "2026-11-muon"


@pytest.fixture(autouse=True)
def _study_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDY.parent / "_support"))
    monkeypatch.syspath_prepend(str(STUDY))


def test_a_run_is_the_librarys_muon_with_every_blocks_learning_rate() -> None:
    from plain import loss_on, train_plain
    from plan import MuonArm
    from run import muon
    from shapes import build
    from stacked import Text

    drawn = np.random.default_rng(0).integers(0, 64, (16, 16)).astype(np.uint16)
    text = Text(drawn, drawn[:4], drawn[4:8])
    arm = MuonArm("tiny", 3, 1e-2, {"emb": 4.0, "vo": 0.5}, warmup=0.34, momentum=0.9)
    found = train_plain(arm, text, muon, rows=4)
    model = build("tiny", seed=0)
    optimizer = Muon(
        param_groups(model, lr=1e-2, ratios={"emb": 4.0, "vo": 0.5}, weight_decay=0.03), lr=1e-2, momentum=0.9
    )
    order = text.order(0, 12)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = arm.lr(group["block"], step)
        ids = torch.from_numpy(drawn[order[4 * step : 4 * step + 4]].astype(np.int64))
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    assert found["val_loss"] == pytest.approx(loss_on(model, text.val, most=4, rows=4), abs=1e-5)
    assert {group["algorithm"] for group in optimizer.param_groups} == {"muon", "adamw"}
    assert found["arm"]["optimizer"] == "muon"


def pretend(arm: Any) -> dict[str, Any]:
    """A loss that is lowest where EMB, NORM and HEAD have four times the rate of the matrices, 2e-3."""
    loss = 3 + math.log2(arm.base_lr / 2e-3) ** 2 / 100 + (arm.warmup != 0.15) / 1000 + arm.seed / 100
    loss += sum((math.log2(arm.ratios.get(block, 1.0)) - 2) ** 2 for block in ("emb", "norm", "head")) / 100
    loss += math.log2(arm.ratios.get("qk", 1.0)) ** 2 / 100 + math.log2(arm.ratios.get("vo", 1.0)) ** 2 / 100
    loss += (arm.momentum != 0.98) / 1000 + (arm.weight_decay != 0.03) / 1000 + (arm.beta2 != 0.95) / 1000
    return {"arm": arm.to_dict(), "tune_loss": loss, "val_loss": loss + 0.3}


PAGES = ("README.template.md", "details.template.md")


def test_the_baseline_has_both_of_its_rates_tuned_and_the_queue_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import plan
    import report

    monkeypatch.setattr(plan, "TRIALS", dict.fromkeys(plan.HORIZONS, 4))
    runs: dict[str, Any] = {}
    while arms := plan.queue(report.Results(runs)):
        runs |= {arm.name: pretend(arm) for arm in arms}
    results = report.Results(runs)
    for steps in plan.HORIZONS:
        best = plan.tuning(steps, "two rates", results)[1]
        assert best is not None
        assert best.ratios == dict.fromkeys(("emb", "norm", "head"), 4.0)
        assert best.base_lr == pytest.approx(2e-3, rel=0.2)
        assert (best.momentum, best.weight_decay, best.beta2) == (0.98, 0.03, 0.95)
        assert {arm.momentum for arm in (*plan.search(steps, results)[0], *plan.starts(steps, results))} == {
            0.95
        }
        uniform = plan.tuning(steps, "uniform", results)[1]
        both = [report.losses(arm, results, plan.SEEDS) for arm in (best, uniform)]
        assert report.gap(*both).mean == pytest.approx(-0.12, abs=0.01)
    assert report.gains_table(results).count("\n") == 1 + len(plan.HORIZONS)
    assert report.searched_table(results).count("\n") == 1 + len(plan.HORIZONS)
    assert report.runs_table(results).count("\n") == len(runs) + 1
    assert "momentum 0.98" in report.settings_table(results)
    assert report.baseline_table(results).count("+0.001") == len(plan.HORIZONS)
    assert report.state(results).count("tuned.") == len(plan.HORIZONS)
    assert "None yet." not in report.tables(results).values()
    for page in PAGES:
        (tmp_path / page).write_text((STUDY / page).read_text(encoding="utf-8"))
    monkeypatch.setattr(report, "HERE", tmp_path)
    for known in (results, report.Results(dict(list(runs.items())[:2]))):
        monkeypatch.setattr(report, "load", lambda _, known=known: known)
        report.main()
        text = (tmp_path / "README.md").read_text()
        assert "{{" not in text
        assert ("(nats-won.png)" in text) == (known is results)
    assert "- 150 steps: `uniform`, `two rates`, `half`, `measured`, `searched` not yet." in text
    assert (tmp_path / "nats-won.png").stat().st_size > 5000


def test_the_pages_have_the_tables_that_follow_from_the_runs() -> None:
    import report

    if not (STUDY / "README.md").exists():
        pytest.skip("the study has no page yet: its runs are being made")
    pages = [(STUDY / name).read_text(encoding="utf-8") for name in ("README.md", "details.md")]
    for name, table in report.tables(report.load(report.RESULTS)).items():
        assert any(table in page for page in pages), name
