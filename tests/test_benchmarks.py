"""The benchmarks: each script runs, and says what it measured, how often and on what."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.processes import run_python

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# The arms of each script's ratios.
SCRIPTS = {
    "optimizer_step": {"blockwise / one group, split", "blockwise / one group, unsplit"},
    "split_forward": {
        f"{precision}: {ratio}"
        for precision in ("fp32", "bf16")
        for ratio in ("split / unsplit", "unsplit again / unsplit", "concatenations alone / unsplit")
    },
    "sharpness_cost": {
        *(
            f"{model}: {ratio}"
            for model in ("GPT-2 small", "quickstart")
            for ratio in (
                "fisher / forward and backward",
                "empirical / forward and backward",
                "empirical from its gradients / whole step",
            )
        ),
        *(
            f"{block}, {labels} labels: {kind} / fp32"
            for block in ("emb", "qk", "vo", "ffn", "norm", "pos")
            for labels in ("same", "own")
            for kind in ("bf16 autocast", "bf16 model")
        ),
    },
    "directional_cost": {
        f"{name}: {ratio}"
        for name in ("GPT-2 small", "quickstart")
        for ratio in (
            "measure_directional / forward and backward",
            "AutoRatios alone / step",
        )
    },
    "train_throughput": {
        "tokens/s: train / bare",
        "tokens/s: train / bare, memory kept",
        "tokens/s: train, compiled / bare, compiled",
        "tokens/s: train, compiled / train",
        "peak memory: train / bare",
        "whole process: train / bare",
    },
    "compile_start": {
        "start: layers / whole",
        "CPU time of compiling: layers / whole",
        "step: layers / whole",
        "step: layers / eager",
    },
    "train_parts": {
        "imports to first step / 10 s: text in the cache",
        "imports to first step / 10 s: text to tokenize",
        "loader / training, tokens/s: 4 x 16 tokens",
        "loader / training, tokens/s: 15 x 64 tokens",
        "evaluation / training: quickstart",
        "checkpoint / training: quickstart",
        "evaluation / training: gpt2-small (computed)",
    },
}
SLOW = {"train_throughput", "compile_start", "train_parts"}  # the first two compile


def run_script(script: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_python(script, *arguments)


@pytest.fixture(scope="module")
def measure():
    """benchmarks/_measure.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("_measure", BENCHMARKS / "_measure.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["_measure"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["_measure"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in SCRIPTS]
)
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
    if name == "train_parts":
        shares = result["measurements"]["share of the training"]
        assert set(shares) == {"data", "forward", "backward", "clipping", "optimizer", "logging", "rest"}
        assert all(share > 0 for (share,) in shares.values())
        assert sum(share for (share,) in shares.values()) == pytest.approx(1, abs=1e-3)
        assert all(seconds > 0 for (seconds,) in result["measurements"]["seconds of the run"].values())


def test_the_table_of_costs_is_made_from_the_latest_results(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from costs_table import page

    assert page(BENCHMARKS / "results") == (BENCHMARKS / "README.md").read_text()


def test_a_part_inside_another_has_its_own_seconds_only(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from _clock import Clock

    now = 0.0
    monkeypatch.setattr("_clock.time.perf_counter", lambda: now)

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Work:
        def outer(self) -> None:
            work(1)
            self.inner()
            work(2)

        def inner(self) -> None:
            work(10)

    clock = Clock()
    clock.of(Work, "outer", "outer")
    clock.of(Work, "inner", "inner")
    Work().outer()
    with pytest.raises(ZeroDivisionError), clock.part("failing"):
        _ = 1 / 0
    work(5)  # the part that failed is over
    Work().inner()
    assert clock.seconds == {"before and after": 5, "outer": 3, "inner": 20, "failing": 0}


@pytest.mark.slow
def test_the_sharpness_benchmark_compares_every_method_on_the_same_blocks(tmp_path):
    done = run_script(BENCHMARKS / "sharpness.py", "--quick", "--repeats", "3", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    ours = {"hutchinson", "hutchinson, differences"}
    theirs = {
        f"{lib} {matrix} hutchinson" for lib in ("curvlinops", "eigenthings") for matrix in ("GGN", "Hessian")
    }
    slow = {"curvlinops GGN hutch++", "curvlinops GGN xtrace", "eigenthings GGN hutch++"}
    for block in ("emb", "qk", "ffn", "vo", "norm"):
        methods = ours | theirs | (slow if block == "ffn" else set())
        of_block = {name for name in result["ratios"] if name.startswith(f"{block} time: ")}
        assert of_block == {f"{block} time: {method} / fisher" for method in methods}
        # What estimates the same matrix is compared with it.
        assert {name for name in result["ratios"] if name.startswith(f"{block} agreement: ")} == {
            f"{block} agreement: {method} - {'fisher' if 'GGN' in method else 'hutchinson'}"
            for method in methods - {"hutchinson"}
        }
        for method in methods | {"fisher"}:
            assert len(result["measurements"]["trace"][f"{block}, {method}"]) == 3
            assert result["measurements"]["5 % error, s"][f"{block}, {method}"][0] > 0
    assert set(result["measurements"]["5 % error of all blocks, s"]) == {"fisher", *ours, *theirs}
    if sys.platform == "linux":
        assert set(result["measurements"]["memory, MB"]) == {
            "forward and backward", "fisher", "curvlinops GGN xtrace",
        }  # fmt: skip
        assert all(peak > 0 for (peak,) in result["measurements"]["memory, MB"].values())
        assert "memory: fisher / forward and backward" in result["ratios"]


class TestEqualError:
    """The arithmetic of benchmarks/sharpness.py, on draws whose variance and time are known."""

    @pytest.fixture
    def script(self, monkeypatch):
        monkeypatch.syspath_prepend(BENCHMARKS)  # for what it imports
        # By its path: tests/sharpness is a module of the same name.
        spec = importlib.util.spec_from_file_location("sharpness_benchmark", BENCHMARKS / "sharpness.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        for name in ("_curvature", "_measure"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        spec.loader.exec_module(module)
        yield module
        for name in ("_curvature", "_measure"):
            sys.modules.pop(name, None)

    def draws(self, script, seconds, *traces):
        return [script.Draw(dict(zip("ab", each)), seconds) for each in zip(*traces)]

    def test_the_time_to_an_error_is_that_of_a_draw_times_the_variance_over_the_errors_square(self, script):
        draws = self.draws(script, 2.0, [90.0, 110.0])  # variance 200
        assert script.seconds_for(draws, "a", {"a": 100.0}) == pytest.approx(2 * 200 / 5**2)

    def test_draws_for_all_blocks_take_as_long_as_the_worst_block_others_their_sum(self, script):
        scale = {"a": 100.0, "b": 100.0}
        together = self.draws(script, 1.0, [90.0, 110.0], [80.0, 120.0])
        assert script.seconds_for_all([together, together], scale) == pytest.approx(800 / 25)
        one = self.draws(script, 1.0, [90.0, 110.0])
        other = [script.Draw({"b": trace}, 1.0) for trace in (80.0, 120.0)]
        assert script.seconds_for_all([one, other], scale) == pytest.approx((200 + 800) / 25)

    def test_agreement_is_the_difference_in_standard_errors(self, script):
        # Means 2 and 8, variances of the means 1 / 3 and 4 / 3.
        apart = script.in_standard_errors([1.0, 2.0, 3.0], [6.0, 8.0, 10.0])
        assert apart == pytest.approx(6 / (5 / 3) ** 0.5)

    def test_too_few_draws_for_a_variance_are_refused(self, tmp_path):
        done = run_script(BENCHMARKS / "sharpness.py", "--repeats", "2", "--out", tmp_path)
        assert done.returncode == 2
        assert "--repeats is 2; expected 3 or more draws, for their variance" in done.stderr


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


GPU = BENCHMARKS / "gpu.sh"
ON_THE_CPU = ("--device", "cpu", "--tiny", "--repeats", "1")


def gpu_checks(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "LIMIT": "900"}
    command = ["bash", str(GPU), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_checks_say_that_there_is_no_gpu(tmp_path):
    done = gpu_checks("--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "no CUDA device"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_parts_of_the_gpu_checks_run_alone_and_one_that_fails_does_not_stop_the_others(tmp_path):
    data = ("--data", tmp_path / "data", "--out", tmp_path, *ON_THE_CPU)
    done = gpu_checks("compare", "fsdp2", *data)  # the first needs text, and there is none yet
    assert done.returncode == 1
    assert "has no train.bin: run gpu.sh prepare first" in done.stderr
    assert "gpu.sh: compare failed (exit code 1" in done.stderr
    (skipped,) = tmp_path.glob("gpu_checks-fsdp2-quick-*.json")
    assert "accelerate runs DDP" in json.loads(skipped.read_text())["skipped"]

    done = gpu_checks("prepare", "correctness", *data)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("gpu_checks-correctness-quick-*.json")
    found = json.loads(path.read_text())
    assert found["hardware"]["device"] == "cpu"
    assert set(found["largest_difference"]) == {"split", "fused", "compiled", "half", "all"}
    assert 0 < found["largest_difference"]["half"] < 0.05


@pytest.mark.slow
def test_every_part_of_the_gpu_checks_runs_on_the_cpu(tmp_path):
    data = ("--data", tmp_path / "data", "--out", tmp_path, *ON_THE_CPU)
    assert gpu_checks("prepare", *data).returncode == 0
    for part in ("throughput", "sharpness", "optimizers", "compare"):
        done = gpu_checks(part, *data)
        assert done.returncode == 0, done.stderr
        assert len(list(tmp_path.glob(f"gpu_checks-{part}-quick-*.json"))) == 1
