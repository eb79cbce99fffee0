"""The study of vision Transformers: what it reads, trains and measures, and the queue that follows from its results."""

from __future__ import annotations

import argparse
import gzip
import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from blockwise_lr import classify
from support.vision import import_timm

STUDY = Path(__file__).parents[2] / "studies" / "2026-11-vit"
STEPS, ROWS = 12, 8


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDY.parent / "_support"))
    monkeypatch.syspath_prepend(str(STUDY))


def pictures() -> Any:
    """Images whose class is a brightness, so that a tiny model learns it in a few steps."""
    from images import CLASSES, SIZE, Images, Split

    generator = np.random.default_rng(0)

    def split(count: int) -> Any:
        labels = generator.integers(0, CLASSES, count).astype(np.uint8)
        noise = generator.integers(0, 8, (count, SIZE, SIZE))
        return Split((labels[:, None, None] * 24 + noise).astype(np.uint8), labels)

    return Images(split(64), split(40), split(40), split(32))


def arm(**changes: Any) -> Any:
    from arms import RULES, Arm

    return Arm(**{"shape": "tiny", "steps": STEPS, "base_lr": 1e-2, "ratios": RULES["half"], **changes})


@pytest.mark.parametrize("shape", ["tiny", "tiny-timm"])
def test_both_libraries_have_the_eight_blocks_of_the_page(shape: str) -> None:
    from along_the_run import BLOCKS
    from arms import SHAPES, build

    if shape == "tiny-timm":
        import_timm()
    model = build(SHAPES[shape], seed=0)
    blocks = classify(model)
    assert {block.value for block in blocks.counts()} == set(BLOCKS)
    found = {
        name.rsplit(".", 1)[-1]: blocks[name].value for name in blocks if "token" in name or "pos" in name
    }
    assert sorted(found.values()) == ["emb", "pos"]
    ends = {name: blocks[name].value for name in list(blocks)[2:4] + list(blocks)[-4:]}
    assert sorted(ends.values()) == ["conv", "conv", "head", "head", "norm", "norm"]


def test_the_measurements_along_a_run_change_nothing_in_it() -> None:
    import training

    plain, watched = (
        training.run(arm(watched=watched), pictures(), rows=ROWS, batches=2) for watched in (False, True)
    )
    apart = ("seconds", "arm", "measurements")
    assert {k: v for k, v in plain.items() if k not in apart} == {
        k: v for k, v in watched.items() if k not in apart
    }
    assert plain["measurements"] == []
    steps = [each["step"] for each in watched["measurements"]]
    assert (steps[0], steps[-1], steps) == (0, STEPS, sorted(set(steps)))
    for each in watched["measurements"]:
        assert set(each["fisher"]) == set(plain["blocks"])
        assert ("directional" in each) == (each["step"] > 0)
    json.dumps(watched, allow_nan=False)


def test_a_run_learns_and_a_diverged_one_has_no_loss() -> None:
    import training

    learned = training.run(arm(steps=60, ratios={}), pictures(), rows=ROWS)
    assert learned["val_loss"] < math.log(10) - 0.5
    assert learned["val_accuracy"] > 0.2
    diverged = training.run(arm(base_lr=1e30), pictures(), rows=ROWS)
    assert (diverged["tune_loss"], diverged["val_accuracy"]) == (None, None)


def test_every_pass_over_the_images_has_another_order() -> None:
    images = pictures()
    order = images.order(0, 150)
    first, second = order[:64], order[64:128]
    assert sorted(first) == sorted(second) == list(range(64))
    assert list(first) != list(second)
    assert list(images.order(0, 64)) == list(first) != list(images.order(1, 64))


def test_a_file_is_read_in_its_format_and_a_wrong_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import images

    values = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    header = b"\0\0\x08\x03" + np.array(values.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))
    assert (images._idx(path) == values).all()
    with pytest.raises(SystemExit, match="delete it and fetch it again"):
        images.read(tmp_path)
    path.unlink()
    with pytest.raises(SystemExit, match=r"is missing: fetch it by `python .*images.py"):
        images.read(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="apt-get is not installed; put the four files"):
        images.fetch(tmp_path / "new")


def test_an_arm_is_trained_by_one_process_and_its_result_is_read_again(tmp_path: Path) -> None:
    import run
    import text_runs

    arguments = argparse.Namespace(results=tmp_path, out=tmp_path, device="cpu")
    chosen, few = arm(steps=2), pictures()
    with FileLock(tmp_path / f"{chosen.name}.lock"), ExitStack() as locks:
        assert text_runs.claim([chosen], tmp_path, tmp_path / "results", 1, locks) == []
    with ExitStack() as locks:
        assert text_runs.claim([chosen], tmp_path, tmp_path / "results", 1, locks) == [chosen]
    text_runs.train([chosen], few, {"images": {"name": "few"}}, arguments, run.train)
    results = text_runs.load(tmp_path)
    found = results.runs[chosen.name]
    assert results.loss(chosen) == found["tune_loss"]
    assert found["versions"]["torch"]
    assert found["images"] == {"name": "few"}


def test_a_missing_library_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import run

    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "timm" else object())
    with pytest.raises(SystemExit, match=r"timm is not installed.*--shapes vit"):
        run.images_of(tmp_path, argparse.Namespace(shapes=[]))
    with pytest.raises(SystemExit, match="is missing: fetch it by"):  # transformers alone is enough
        run.images_of(tmp_path, argparse.Namespace(shapes=["vit"]))


def test_the_list_says_what_is_needed_and_the_flag_of_the_data_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import run

    given = ["run.py", "--out", str(tmp_path / "out"), "--results", str(tmp_path)]
    source = run.Source("images", "the folder", "a folder", run.images_of)

    def main() -> None:
        run.main(
            "", run.queue, run.MODELS, results=tmp_path, out=tmp_path, source=source, minutes=run.minutes
        )

    monkeypatch.setattr("sys.argv", [*given, "--list"])
    main()
    assert "24 runs known to be needed, about 24 core-minutes" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", given)
    with pytest.raises(SystemExit):
        main()
    assert "--images is missing: a folder" in capsys.readouterr().err


def pretend(chosen: Any, measurements: Any) -> dict[str, Any]:
    """A result that is best at a rate of 4e-3, a warm-up of 5 %, an EMB ratio of 2 and more steps."""
    loss = 0.6 + (math.log2(chosen.base_lr / 4e-3)) ** 2 / 100 + (chosen.warmup != 0.05) / 1000
    loss += (
        (math.log2(chosen.ratios.get("emb", 1.0)) - 1) ** 2 / 1000 - chosen.steps / 1e4 + chosen.seed / 1e3
    )
    loss += (chosen.seed + 1) * len(chosen.ratios) / 1e5
    return {
        "arm": chosen.to_dict(), "tune_loss": loss, "val_loss": loss, "val_accuracy": 0.8,
        "measurements": measurements if chosen.watched else [], "seconds": 60.0, "date": "2026-11-28T01:00:00",
        "hardware": {"cpu": "a processor"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished() -> dict[str, Any]:
    """The results of the whole queue, with few trials in the search and one real set of measurements."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(STUDY.parent / "_support"))
        patched.syspath_prepend(str(STUDY))
        import plan
        import training

        patched.setattr(plan, "TRIALS", 8)
        watched = training.run(arm(watched=True), pictures(), rows=ROWS, batches=2)["measurements"]
        runs: dict[str, Any] = {}
        while arms := plan.queue(plan.Results(runs), ["vit", "vit-timm"]):
            runs |= {each.name: pretend(each, watched) for each in arms}
    return runs


def test_the_queue_brackets_the_best_rate_of_every_rule_and_ends(
    finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import plan

    monkeypatch.setattr(plan, "TRIALS", 8)
    results = plan.Results(finished)
    for steps in (plan.SHORT, plan.LONG):
        tried, best = plan.tuning("vit", steps, "uniform", results)
        assert best is not None
        assert best.warmup == 0.05
        rates = [each.base_lr for each in tried]
        assert min(rates) < best.base_lr < max(rates)
        assert len(tried) >= 3 + 2 + len(plan.BASELINE)
    assert plan.own_ratios("vit", results)["ffn"] == 1.0
    first = plan.queue(plan.Results({}))[:4]
    assert [each.ratios for each in first] == list(plan.RULES.values())


def test_the_search_is_the_same_whatever_the_order_in_which_its_trials_end(
    finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import plan

    monkeypatch.setattr(plan, "TRIALS", 8)
    whole = plan.search("vit", plan.Results(finished))
    trials = [each.name for each in whole[0]]
    done = {name: run for name, run in finished.items() if name not in trials}
    while (tried := plan.search("vit", plan.Results(done)))[1] is None:
        last = [each for each in tried[0] if each.name not in done][-1]
        done[last.name] = finished[last.name]
    assert tried == whole
    assert set(whole[0][0].ratios) == set(plan.SPACE.blocks)


def test_the_tables_and_figures_follow_from_the_results(
    finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import along_the_run
    import plan
    import report

    monkeypatch.setattr(plan, "TRIALS", 8)
    results = plan.Results(finished)
    shown = report.tables(results)
    assert "None yet." not in shown.values()
    assert "Against tuned uniform over 3 120 steps: `half` " in shown["answer"]
    few = report.tables(plan.Results(dict(list(finished.items())[:4])))
    assert few["gains"] == few["order"] == "None yet."
    assert few["answer"].startswith("Not answered yet")
    counts = along_the_run.order_counts(results)["uniform"]
    points = [each["fisher"] for each in along_the_run.measured_runs(results)["uniform"]["measurements"][1:]]
    assert counts["qk", "ffn"] == (sum(p["qk"][0] < p["ffn"][0] for p in points), len(points))
    found = report.all_tuned(results)
    uniform, half = (found["vit", plan.SHORT, rule] for rule in ("uniform", "half"))
    expected = np.mean([uniform.losses[seed] - half.losses[seed] for seed in (0, 1, 2)])
    assert report.gap(uniform.losses, half.losses).mean == pytest.approx(expected)
    assert any("(" in row for row in shown["ratios"].splitlines() if row.startswith("| searched |"))
    assert "| timm | uniform | fisher |" in shown["order"]
    assert shown["state"].count("tuned.") == 3
    assert "- timm, 780 steps: `uniform`, `half`, `measured`, `paper` " in few["state"]
    assert not any(
        run["arm"]["shape"] == "vit-timm" and run["arm"]["steps"] > plan.SHORT for run in finished.values()
    )
    assert along_the_run.draw_sharpness(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert set(report.gains(found)) == {
        "transformers, 780 steps", "transformers, 3 120 steps", "timm, 780 steps",
    }  # fmt: skip


def test_the_templates_can_be_filled_in(
    finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import plan
    import report

    for page in STUDY.glob("*.template.md"):
        (tmp_path / page.name).write_text(page.read_text(encoding="utf-8"))
    monkeypatch.setattr(plan, "TRIALS", 8)
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "load", lambda _: plan.Results(finished))
    report.main()
    text = (tmp_path / "README.md").read_text()
    assert "{{" not in text
    assert "one thread of a processor, 2026-11-28" in text
    assert "(sharpness-along-the-run.png)" in text
    assert "(nats-won.png)" in text


def test_the_pages_have_the_tables_that_follow_from_the_runs() -> None:
    import report

    results = report.load(report.RESULTS)
    pages = [
        path.read_text(encoding="utf-8")
        for path in (STUDY / "README.md", STUDY / "details.md")
        if path.exists()
    ]
    if not results.runs:
        assert pages == []  # a study that has not run has no page
        with pytest.raises(SystemExit, match="no run has ended"):
            report.main()
        return
    for name, table in report.tables(results).items():
        assert any(table in page for page in pages), name
