"""What README and studies/2026-11-principle say about the principle is what the data say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from blockwise_lr import SharpnessReport
from blockwise_lr.sharpness.principle import order_agreement

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "studies" / "2026-11-principle"
RUNS = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("data/*-seed*.json"))]


def of(*cases: str) -> list[dict[str, Any]]:
    return [run for run in RUNS if run["case"] in cases]


def reports(run: dict[str, Any]) -> dict[int, SharpnessReport]:
    """By `fisher`, by step."""
    return {point["step"]: SharpnessReport.from_dict(point["fisher"]) for point in run["points"]}


def over_vo(run: dict[str, Any], step: int) -> float:
    report = reports(run)[step]
    return report["norm"].mean / report["vo"].mean


def last(run: dict[str, Any]) -> int:
    return max(point["step"] for point in run["points"])


def test_qk_ffn_vo_is_the_order_from_1_percent_on_with_3072_tokens():
    for run in of("gpt2", "llama", "llama-long"):
        for step, report in reports(run).items():
            if step >= 0.01 * last(run):
                assert report["qk"].mean < report["ffn"].mean < report["vo"].mean


def test_with_16384_tokens_qk_is_the_sharper_one_at_a_quarter_of_the_run_only():
    (run,) = of("llama-vocab-16k")
    assert [s for s, r in reports(run).items() if r["qk"].mean > r["ffn"].mean] == [0.25 * last(run)]


def test_norm_against_vo_is_as_the_page_says():
    assert all(0.45 < over_vo(run, 600) < 1.15 for run in of("llama"))
    assert all(0.65 < over_vo(run, 600) < 0.85 for run in of("gpt2"))
    (long,) = of("llama-long")
    assert over_vo(long, 2400) == pytest.approx(2.9, abs=0.05)
    assert over_vo(long, 240) < 1 < over_vo(long, 600)


def test_emb_ends_between_qk_and_vo():
    for run in of("gpt2", "llama", "llama-long"):
        report = reports(run)[last(run)]
        assert report["qk"].mean < report["emb"].mean < report["vo"].mean
    for run in of("gpt2"):
        assert reports(run)[30]["emb"].mean > reports(run)[30]["vo"].mean


def test_the_agreement_with_the_papers_order_is_as_the_page_says():
    short = {
        (run["case"], step): order_agreement(report)
        for run in of("gpt2", "llama", "llama-vocab-16k")
        for step, report in reports(run).items()
        if step > 0
    }
    above = [key for key, tau in short.items() if tau > 0.61]
    assert above == [("llama-vocab-16k", 15)]
    assert min(short.values()) == pytest.approx(0)
    for run in of("gpt2", "llama", "llama-vocab-16k"):
        assert 0.39 < order_agreement(reports(run)[last(run)]) < 0.61
    (long,) = of("llama-long")
    assert order_agreement(reports(long)[2400]) == pytest.approx(0.8)


def test_the_datas_labels_overstate_norm_by_what_the_page_says():
    for run in RUNS:
        fisher = reports(run)
        for point in run["points"]:
            step = point["step"]
            if not point["empirical"]:
                continue
            ratio = point["empirical"]["norm"] / fisher[step]["norm"].mean
            share = step / last(run)
            if share <= 0.02:
                assert 7 < ratio < 105.5
            elif run["case"] == "llama-vocab-16k" and step == 15:
                assert ratio == pytest.approx(500, rel=0.05)
            elif share == 0.1:
                assert 2 < ratio < 23.5
            elif share >= 0.25:
                once = run["case"] == "llama-vocab-16k" and step == 75
                assert ratio == pytest.approx(7.8, abs=0.05) if once else 1.05 < ratio < 4.65


def test_the_pages_are_made_from_the_data(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from measure_principle import read_runs
    from principle_report import write_text

    shutil.copytree(FOLDER, tmp_path, ignore=shutil.ignore_patterns("*.png", "data"), dirs_exist_ok=True)
    write_text(tmp_path, read_runs(FOLDER / "data"))
    for page in ("README.md", "details.md"):
        assert (tmp_path / page).read_text() == (FOLDER / page).read_text()
