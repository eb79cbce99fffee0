"""`blockwise-lr sharpness RUN --directional`: which block holds the learning rate back?"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from blockwise_lr import DirectionalReport
from blockwise_lr.analysis.measure_model import measure_model
from blockwise_lr.analysis.measure_settings import MeasureConfig
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.ratio_text import parse_ratios
from blockwise_lr.train.run import train
from support.commands import call

FAST = ("--directional", "--batches", "3", "--device", "cpu")


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    """A finished run with checkpoints at steps 8, 16 and 24."""
    monkeypatch.chdir(tmp_path)
    train(
        replace(tiny, save_every=8, keep_checkpoints=9, optim=replace(tiny.optim, ratios="vo=2")),
        tmp_path / "run",
    )
    return tmp_path / "run"


def test_every_checkpoint_is_measured_along_its_own_optimizers_update(run, capsys):
    code, out, err = call(capsys, "sharpness", run, *FAST)
    assert code == 0
    assert "along the optimizer's update" in out
    assert "step 8: learning rate over the RMS of the weights before training: emb " in err
    assert "verdict" in out
    # The last checkpoint is at the schedule's floor, where every block could go up.
    assert "step 8, along" in out
    assert " 8 ┃" in out
    assert " 24 ┃" in out
    assert "in the mean over FFN's (*: not determined, measured's)" in " ".join(out.split())
    folder = run / "sharpness"
    report = DirectionalReport.from_json(folder / "directional.json")
    content = json.loads((folder / "directional.json").read_text())
    assert [each["step"] for each in content["earlier"]] == [8, 16]
    assert report.step == 24
    assert report["vo"].ratio == 2.0
    over_rms = content["about"]["lr_over_initial_rms"]
    shown = DirectionalReport.from_dict(content["earlier"][0])
    assert over_rms == {b.value: s.lr / content["about"]["initial_rms"][b.value] for b, s in shown.items()}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (used,) = [row["lr"]["vo"] for row in rows if row["step"] == 24]
    assert report["vo"].lr == pytest.approx(used)  # of the last step: the schedule is at the floor by now
    assert used > 5.5e-4
    assert DirectionalReport.from_dict(content["earlier"][0])["vo"].lr > 5e-3
    assert (folder / "directional.png").stat().st_size > 10_000
    ratios = content["ratios"]
    assert set(ratios) == {block.value for block in report}
    assert (ratios["ffn"]["ratio"], ratios["ffn"]["determined"]) == (1.0, True)
    left = [name for name, found in ratios.items() if not found["determined"]]
    assert left, "three checkpoints of a run of 24 steps decide little"
    for name in left:
        begin = f"{name.upper()}: not determined by this measurement"
        (line,) = [line for line in out.splitlines() if line.startswith(begin)]
        assert line.endswith(f"using measured's {ratios[name]['prior']:g}")
        assert ratios[name]["ratio"] == ratios[name]["prior"]
    with pytest.warns(UserWarning, match="does not determine"):
        used = parse_ratios(str(folder / "directional.json"))
    assert {b.value: ratio for b, ratio in used.items()} == {name: r["ratio"] for name, r in ratios.items()}


def test_a_checkpoint_from_before_the_run_was_made_longer_has_the_rates_of_its_own_schedule(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = replace(tiny, steps=8, log_every=1, eval_every=0, save_every=4, keep_checkpoints=9)
    for steps in (8, 12, 16):
        train(replace(config, steps=steps), tmp_path / "run")
    reports, _ = measure_model("run", MeasureConfig(directional=True, batches=2, device="cpu"))
    rows = {row["step"]: row["lr"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    for report in reports:
        rates = {block.value: slope.lr for block, slope in report.items()}
        assert rates == pytest.approx({block: rows[report.step][block] for block in rates})
    assert [report.step for report in reports] == [4, 8, 12, 16]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "checkpoint-24" / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda run: None, "--histogram True is about average sharpness; --directional has none"),
    ],
)
def test_what_cannot_be_measured_gives_one_line(run, capsys, break_it, message):
    break_it(run)
    flags = ("--histogram",) if "histogram" in message else ()
    code, _, err = call(capsys, "sharpness", run / "checkpoint-24", *FAST, *flags)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_model_without_an_optimizer_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, "sharpness", "quickstart", *FAST)
    assert code == 2
    assert "quickstart has no optimizer: expected the folder of a run" in err
