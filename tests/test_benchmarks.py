"""The benchmarks: each script runs, and says what it measured, how often and on what."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from blockwise_lr import classify
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig
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
    "memory": {
        "measure_directional, fp32: extra bytes / parameters",
        "measure_directional, bf16: extra bytes / parameters",
        "AutoRatios, fp32: extra bytes / parameters",
        "AdamMini.step, fp32: extra bytes / parameters",
        "AdamMini.step, bf16: extra bytes / parameters",
        "measure_sharpness, fp32: extra bytes / parameters",
        "activations with checkpointing: measure_sharpness / training step",
    },
    "train_throughput": {
        "tokens/s: train / bare",
        "tokens/s: train / bare, memory kept",
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
SLOW = {"train_throughput", "compile_start", "train_parts", "memory"}  # the first compiles


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
    sys.modules.pop("_measure", None)  # another test's fixture may have removed it


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
        assert ratio["median"] > 0 or name == "memory"
        assert ratio["met"] is None  # tiny shapes are not judged
    for arms in result["measurements"].values():
        assert all(len(values) == 1 for values in arms.values())
    printed = " ".join(done.stdout.replace("│", " ").split())
    assert all(ratio.split(": ")[0] in printed for ratio in SCRIPTS[name])
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


ON_THE_CPU = ("--device", "cpu", "--tiny")


def gpu_checks(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_script(BENCHMARKS / "gpu", *arguments)


@pytest.fixture
def gpu(monkeypatch):
    """A function that imports a module of benchmarks/gpu, as its command line does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield lambda name: importlib.import_module(f"gpu.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("gpu", "_measure")]:
        del sys.modules[name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_checks_say_that_there_is_no_gpu(tmp_path):
    done = gpu_checks("run", "all", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("no CUDA device")
    assert not list(tmp_path.iterdir())


def test_the_plan_of_the_gpu_checks_lists_what_fits_the_most_important_first():
    done = gpu_checks("plan", "--seconds", "160")
    assert done.returncode == 0, done.stderr
    _, *rows, _ = done.stdout.splitlines()
    fits = {row.split()[0]: " yes " in row for row in rows}
    assert list(fits) == [
        "costs",
        "correctness",
        "throughput",
        "optimizers",
        "fsdp2",
        "memory",
        "paper-scale",
    ]
    assert [part for part, yes in fits.items() if yes] == ["costs", "correctness"]
    assert gpu_checks("plan", "sharpnes").returncode == 2


@pytest.mark.parametrize("seconds", [0, 100, 333, 600, 900, 10_000])
def test_the_parts_that_the_plan_takes_end_in_time(gpu, seconds):
    parts = gpu("parts")
    rows = parts.fitting(parts.PARTS, seconds)
    now = parts.START
    for part, end, fits in rows:
        assert fits == (now + parts.least_seconds(part) <= seconds)
        assert end == now + part.seconds
        now = end if fits else now
    assert all(
        part.seconds <= parts.LIMIT == part.limit for part in parts.PARTS if part.name != "paper-scale"
    )


def test_a_part_of_the_gpu_checks_runs_alone_and_once(tmp_path):
    arguments = ("run", "optimizers", *ON_THE_CPU, "--out", tmp_path)
    done = gpu_checks(*arguments)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("gpu-optimizers-tiny-20*.json")
    found = json.loads(path.read_text())
    assert found["finished"]
    assert found["torch"] == torch.__version__
    assert found["card"] == found["hardware"]["cpu"]
    assert found["command"].startswith("python benchmarks/gpu run optimizers --device cpu --tiny")
    assert set(found["ratios"]) == {
        f"{what}, GPT-2: {name} / adamw" for what in ("step", "state") for name in ("adam-mini", "muon")
    }
    written = path.read_bytes()
    done = gpu_checks(*arguments)
    assert "optimizers: done before" in done.stdout
    assert path.read_bytes() == written


class TestPartsOfTheGpuChecks:
    @pytest.fixture
    def run(self, gpu, monkeypatch, tmp_path):
        """Runs parts given as functions; returns the names of those that failed, and their files."""

        def run(limit: int | None = None, **measures):
            parts = []
            for name, measure in measures.items():
                module = types.ModuleType(name)
                module.measure = measure
                monkeypatch.setitem(sys.modules, f"gpu.{name}", module)
                parts.append(gpu("parts").Part(name, name, 1, "", limit))
            options = argparse.Namespace(
                device="cpu", tiny=True, repeats=1, data=None, out=tmp_path, again=False
            )
            failed = gpu("run_parts").run_parts(parts, options, end=None, folder=tmp_path)
            files = {name: next(tmp_path.glob(f"gpu-{name}-tiny-*.json"), None) for name in measures}
            return failed, {name: path and json.loads(path.read_text()) for name, path in files.items()}

        return run

    def test_one_that_fails_writes_its_error_and_the_next_goes_on(self, run):
        def breaks(task):
            task.record.add(measurements={"seconds": {"first": [1.0]}})
            raise SystemExit("the second is wrong")

        failed, files = run(breaks=breaks, works=lambda task: task.record.add(found=7))
        assert failed == ["breaks"]
        assert "SystemExit: the second is wrong" in files["breaks"]["error"]
        assert files["breaks"]["measurements"] == {"seconds": {"first": [1.0]}}
        assert not files["breaks"]["finished"]
        assert files["works"]["finished"]
        assert files["works"]["found"] == 7

    def test_one_that_lacks_a_package_fails_alone(self, run):
        def lacks(task):
            import no_such_package  # noqa: F401

        failed, files = run(lacks=lacks, works=lambda task: None)
        assert failed == ["lacks"]
        assert "No module named 'no_such_package'" in files["lacks"]["error"]

    def test_one_that_takes_too_long_is_cut_off(self, run):
        def endless(task):
            task.record.add(found=7)
            while True:
                pass

        failed, files = run(limit=1, endless=endless)
        assert failed == ["endless"]
        assert files["endless"]["found"] == 7
        assert "cut off after 1 s" in files["endless"]["error"]

    def test_one_that_is_done_is_skipped_and_one_that_failed_is_run_again(self, run):
        calls = []

        def fails_once(task):
            calls.append("fails_once")
            if len(calls) == 1:
                raise ValueError("once")

        assert run(fails_once=fails_once)[0] == ["fails_once"]
        assert run(fails_once=fails_once)[0] == []
        assert run(fails_once=fails_once)[0] == []
        assert len(calls) == 2

    def test_a_result_of_another_card_or_commit_or_day_does_not_count(self, gpu):
        is_same = gpu("record").is_same
        now = datetime.now(UTC)
        wanted = {"part": "costs", "card": "H100", "torch": "2.13", "git_commit": "abc", "tiny": False}
        found = {**wanted, "finished": True, "date": now.isoformat()}
        assert is_same(found, wanted)
        for other in (
            {"card": "H200"},
            {"git_commit": "abc+changes"},
            {"finished": False},
            {"date": (now - timedelta(days=2)).isoformat()},
        ):
            assert not is_same({**found, **other}, wanted)


# Only these packages and what they require are on the machine.
PACKAGES = (
    *("torch", "transformers", "accelerate", "tokenizers", "safetensors"),
    *("tyro", "docstring_parser", "typeguard"),
)
HIDE = """
import sys
from importlib.machinery import PathFinder
class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
"""


def required(packages: Iterable[str]) -> set[str]:
    """Names of the packages and of all that they require, without extras."""
    found: set[str] = set()
    waiting = list(packages)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@pytest.mark.slow  # benchmarks/gpu/stripped.sh does the same in an environment of its own
def test_every_part_of_the_gpu_checks_runs_on_the_cpu_with_few_packages(tmp_path, monkeypatch):
    allowed = required(PACKAGES)
    assert not allowed & {"scipy", "datasets", "matplotlib", "curvlinops-for-pytorch", "pytorch-optimizer"}
    hidden = [
        module
        for module, owners in metadata.packages_distributions().items()
        if module != "blockwise_lr" and not allowed & {canonicalize_name(owner) for owner in owners}
    ]
    # Python imports sitecustomize at its start, so the processes that a part begins see no other packages either.
    (tmp_path / "sitecustomize.py").write_text(f"HIDDEN = {hidden!r}\n{HIDE}")
    source = str(BENCHMARKS.parent / "src")
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu"), "run", "all", *ON_THE_CPU, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), source]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {
        path.name.removeprefix("gpu-").partition("-tiny")[0]: path for path in out.glob("gpu-*-20*.json")
    }
    assert set(found) == {
        "costs", "correctness", "throughput", "optimizers", "fsdp2", "memory", "paper-scale",
    }  # fmt: skip
    results = {name: json.loads(path.read_text()) for name, path in found.items()}
    assert all(result["finished"] and "error" not in result for result in results.values())
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from costs_table import SHOWN_ON_GPU

    for part, shown in SHOWN_ON_GPU.items():
        assert {name for name in shown if "compiled /" not in name} <= set(results[part]["ratios"])
    assert results["throughput"]["graphs"]["train"] > 0
    assert results["throughput"]["graphs"]["bare"] == 0  # the loop runs what `train` has compiled
    assert set(results["correctness"]["largest_difference"]) == {"split", "fused", "half", "all"}
    assert 0 < results["correctness"]["largest_difference"]["half"] < 0.05
    from gpu.paper_runs import RUNS

    # All have four steps here, so runs that differ by their steps alone are one.
    assert len(results["paper-scale"]["runs"]) == len({run.rpartition(":")[0] for run in RUNS})


def test_the_page_about_memory_is_made_from_the_latest_results():
    from memory_page import PAGE, page

    assert page(BENCHMARKS / "results") == PAGE.read_text()


class TestExtraMemory:
    """benchmarks/memory.py counts bytes exactly."""

    @pytest.fixture
    def memory(self, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("memory")
        for name in ("memory", "_measure"):
            sys.modules.pop(name, None)

    def test_a_temporary_counts_while_it_lives(self, memory):
        kept = []

        def work():
            torch.empty(1_000_000)  # 4 MB, freed
            kept.append(torch.empty(500_000))
            torch.empty(1_000_000)

        extra = memory.extra_memory(work, "cpu")
        assert extra.allocated == 6_000_000

    def test_what_was_allocated_before_and_is_freed_makes_room(self, memory):
        with memory.known_sizes("cpu"):
            kept = [torch.empty(1_000_000)]

        def work():
            kept.clear()
            torch.empty(1_500_000)

        assert memory.extra_memory(work, "cpu").allocated == 2_000_000

    def test_the_shares_of_the_blocks_are_those_of_llama_7b(self, memory):
        """So the largest block, which bounds what is worked on at a time, has its true share."""

        def shares(config):
            with torch.device("meta"):
                counts = classify(build_model(config, seed=0)).counts()
            return {block: count / sum(counts.values()) for block, count in counts.items()}

        large = ModelConfig("llama", 4096, 32, 32, ffn_size=11_008, vocab_size=32_000, context=64)
        ours = shares(memory.WIDE)
        for block, share in shares(large).items():
            assert ours[block] == pytest.approx(share, abs=0.01)
