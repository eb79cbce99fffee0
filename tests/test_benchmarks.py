"""The benchmarks: each script runs, and says what it measured, how often and on what."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# The arms of each script's ratios.
SCRIPTS = {
    "optimizer_step": {"blockwise / one group, split", "blockwise / one group, unsplit"},
    "split_forward": {
        f"{precision}: {ratio}"
        for precision in ("fp32", "bf16")
        for ratio in ("split / unsplit", "unsplit again / unsplit", "concatenations alone / unsplit")
    },
    "train_throughput": {
        "tokens/s: train / bare",
        "tokens/s: train / bare, memory kept",
        "peak memory: train / bare",
        "whole process: train / bare",
    },
}


def run_script(script: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def measure():
    """benchmarks/_measure.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("_measure", BENCHMARKS / "_measure.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["_measure"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["_measure"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_writes_its_ratios_with_their_spread_and_circumstances(name, tmp_path):
    done = run_script(BENCHMARKS / f"{name}.py", "--quick", "--repeats", "1", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert path.name.startswith(f"{name}-quick-20")
    result = json.loads(path.read_text())
    assert set(result) == {
        "benchmark", "command", "date", "versions", "git_commit", "hardware", "load_average", "quick",
        "repeats", "settings", "measurements", "ratios",
    }  # fmt: skip
    assert set(result["ratios"]) == SCRIPTS[name]
    for ratio in result["ratios"].values():
        assert set(ratio) == {"median", "min", "max", "iqr", "target", "met", "values"}
        assert len(ratio["values"]) >= 1
        assert ratio["median"] > 0
        assert ratio["met"] is None  # tiny shapes are not judged
    for arms in result["measurements"].values():
        assert all(len(values) == 1 for values in arms.values())
    assert all(ratio in done.stdout for ratio in SCRIPTS[name])


@pytest.mark.slow  # the BPE is trained on all of the embedded text
def test_the_tokenizing_benchmark_compares_both_arms(tmp_path):
    # A copy, since its results go beside the script; 240 documents, so that every split gets one.
    script = tmp_path / "tokenizing.py"
    script.write_text((BENCHMARKS / "tokenizing.py").read_text())
    done = run_script(script, "--speed-mb", "1.2", "--repeats", "1", "--vocab-size", "300", "--memory-mb")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").iterdir()
    speed = json.loads(path.read_text())["speed"]
    assert set(speed["mb_per_s"]) == {"ours", "datasets.map"}
    assert set(speed["ratio"]) == {"median", "min", "max"}


def test_arms_are_measured_in_turns_and_each_goes_first_every_other_time(measure):
    order: list[str] = []
    arms = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    assert measure.in_turns(arms, 3) == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert order == list("abbaab")


def test_a_ratio_is_taken_repeat_by_repeat_and_judged_by_its_median(measure):
    # The medians of the arms themselves (2 and 4) would give 0.5.
    measured = {"ours": [2.0, 1.0, 9.0], "theirs": [1.0, 4.0, 5.0]}
    slower = measure.ratio(measured, "ours", "theirs", at_most=1.03)
    assert slower.values == [2.0, 0.25, 1.8]
    assert slower.to_dict() == {
        "median": 1.8, "min": 0.25, "max": 2.0, "iqr": [1.025, 1.9], "target": "<= 1.03", "met": False,
        "values": [2.0, 0.25, 1.8],
    }  # fmt: skip
    assert measure.ratio(measured, "ours", "theirs", at_least=1.8).met is True
    assert measure.ratio(measured, "ours", "theirs", at_least=1.81).met is False
    assert measure.ratio(measured, "ours", "theirs").met is None


def test_no_repeats_are_refused(measure):
    with pytest.raises(ValueError, match="repeats is 0; expected 1 or more"):
        measure.in_turns({"a": float}, 0)
