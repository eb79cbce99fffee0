"""A search that is interrupted, continued or extended is the search that it would have been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from blockwise_lr.errors import UserError
from blockwise_lr.tune.early_end import EarlyEnd
from blockwise_lr.tune.search import check_folder, run_search
from blockwise_lr.tune.search_plan import SearchPlan
from blockwise_lr.tune.search_progress import SearchProgress
from blockwise_lr.tune.trial_store import TrialStore
from blockwise_lr.tune.tuning import tune
from blockwise_lr.tune.worker_pool import WorkerPool
from support.synthetic_search import BASE, PLAN, WORKER, quiet, search


def trials(store):
    """Every trial without what depends on the clock."""
    return [replace(record, seconds=None) for _, record in sorted(store.records.items())]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return trials(search(PLAN, tmp_path_factory.mktemp("whole")))


def test_the_phases_follow_one_another_and_the_best_is_repeated(whole):
    assert [record.phase for record in whole] == ["uniform"] * 3 + ["ratios"] * 11 + ["repeat"] * 2
    searched = whole[:14]
    assert not any(record.point.ratios for record in searched[:3])
    uniform = min(searched[:3], key=lambda record: record.loss)
    best = min(searched, key=lambda record: record.loss)
    assert best.loss < uniform.loss - 0.1
    assert [(record.point, record.seed) for record in whole[14:]] == [(uniform.point, 1), (best.point, 1)]
    assert [record.order for record in whole] == list(range(1, 17))


def test_the_search_starts_at_the_unchanged_default_and_at_measured_for_the_tuned_uniform_rate(whole):
    uniform = min(whole[:3], key=lambda record: record.loss).point
    rate = uniform.base_lr
    half, measured = whole[3].point, whole[4].point
    assert (half.base_lr, half.warmup) == (pytest.approx(rate, rel=1e-3), uniform.warmup)
    assert measured.ratios == {"emb": 16, "qk": 4, "vo": 0.5, "norm": 32, "head": 16}
    assert measured.base_lr == pytest.approx(rate / 4, rel=1e-3)
    assert half.ratios["emb"] == 4
    assert half.ratios["norm"] == pytest.approx(6, rel=1e-3)


@pytest.mark.parametrize("stop", [2, 5, 15])
def test_a_search_that_was_cut_off_goes_on_as_an_uninterrupted_one(tmp_path, monkeypatch, whole, stop):
    monkeypatch.setenv("SYNTHETIC_EXIT", str(stop))
    with pytest.raises(UserError, match=f"the process of trial {stop} ended with exit code 9: out of memory"):
        search(PLAN, tmp_path)
    monkeypatch.delenv("SYNTHETIC_EXIT")
    assert TrialStore(tmp_path / "trials").records[stop].status == "running"
    assert trials(search(PLAN, tmp_path)) == whole


def test_a_finished_search_runs_nothing_when_called_again(tmp_path, whole):
    search(PLAN, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "trials").iterdir()}
    assert trials(search(PLAN, tmp_path)) == whole
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "trials").iterdir()} == before


def test_more_trials_continue_a_finished_search(tmp_path, whole):
    check_folder(PLAN, tmp_path)
    search(PLAN, tmp_path)
    more = replace(PLAN, trials=20)
    check_folder(more, tmp_path)
    found = trials(search(more, tmp_path))
    assert found[:16] == whole
    assert sum(record.phase != "repeat" for record in found) == 20


def test_a_continued_search_tunes_uniform_against_uniform(tmp_path):
    """Ratios that are better by the margin must not end the trials of the baseline that they are compared with."""
    strict = replace(PLAN, early_end=EarlyEnd(margin=0.1), repeats=1)
    search(strict, tmp_path / "continued")
    found = {
        name: [
            (r.point, r.status)
            for r in search(replace(strict, trials=40), tmp_path / name).of_phase("uniform")
        ]
        for name in ("continued", "whole")
    }
    assert found["continued"] == found["whole"]


def test_workers_in_parallel_run_the_same_number_of_trials(tmp_path, whole):
    found = trials(search(PLAN, tmp_path, workers=3))
    assert len(found) >= len(whole)
    assert sorted(record.order for record in found) == list(range(1, len(found) + 1))
    assert sum(record.phase == "ratios" for record in found) == 11


def test_runs_that_diverge_or_are_lost_are_recorded_and_searched_around(tmp_path):
    far = replace(
        PLAN, base=replace(BASE, optim=replace(BASE.optim, base_lr=0.15)), early_end=EarlyEnd(margin=0.2)
    )
    found = trials(search(far, tmp_path))
    status = {record.status for record in found[:14]}
    assert status == {"finished", "diverged", "ended"}
    for record in found:
        if record.status != "finished":
            assert record.tune_loss is None
            assert record.loss == float("inf")


def test_without_a_rule_no_run_ends_early(tmp_path):
    plan = replace(PLAN, base=replace(BASE, optim=replace(BASE.optim, base_lr=0.05)), early_end=None)
    assert {record.status for record in trials(search(plan, tmp_path))} == {"finished"}


def test_nothing_but_divergence_is_said_as_it_is(tmp_path):
    plan = replace(PLAN, base=replace(BASE, optim=replace(BASE.optim, base_lr=5.0)))
    check_folder(plan, tmp_path / "far")
    with pytest.raises(UserError, match="every run with one learning rate for all blocks diverged") as error:
        search(plan, tmp_path / "far")
    assert str(error.value).endswith("lower --base-lr, with another --out")
    with pytest.raises(UserError, match="holds a search with --base-lr 5.0"):
        check_folder(PLAN, tmp_path / "far")
    check_folder(PLAN, tmp_path / "near")
    assert search(PLAN, tmp_path / "near").best("uniform") is not None


def test_a_failing_trial_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNTHETIC_FAIL", "4")
    with pytest.raises(UserError, match="trial 4: no text"):
        search(PLAN, tmp_path)


def test_a_worker_that_exited_with_its_task_unread_is_named_and_no_other_is_left(tmp_path):
    program = tmp_path / "worker.py"
    program.write_text(
        "import os, sys, time\n"
        "if 'long' in sys.stdin.readline(): time.sleep(60)\n"
        'os.write(1, b\'{"status": "finished"}\\n\')\n'
        "os.write(2, b'out of memory\\n')\n"
        "os._exit(9)\n"
    )
    pool = WorkerPool(2, tmp_path, cpu=True, command=(sys.executable, str(program)))

    def submit_three():
        with pool:
            pool.submit(1, {})
            pool.submit(2, {"long": True})
            while pool.poll(1.0) is None:
                pass
            pool._processes[0].wait()
            pool.submit(3, {})

    with pytest.raises(UserError, match="the process of trial 3 ended with exit code 9: out of memory"):
        submit_three()
    assert all(process.poll() is not None for process in pool._processes)


def with_optim(**changes):
    return replace(PLAN, base=replace(BASE, optim=replace(BASE.optim, **changes)))


@pytest.mark.parametrize(
    ("plan", "there", "here"),
    [
        (replace(PLAN, base=replace(BASE, steps=50)), "--steps 100", "--steps 50"),
        (replace(PLAN, proxy="8x1"), "--proxy 16x2", "--proxy 8x1"),
        (replace(PLAN, early_end=None), "--early-end", "--no-early-end"),
        (replace(PLAN, base=replace(BASE, compile=True)), "--no-compile", "--compile"),
        (replace(PLAN, base=replace(BASE, tf32=True)), "--no-tf32", "--tf32"),
        (with_optim(relative_to="init"), "--relative-to lr", "--relative-to init"),
        (with_optim(warmup_start="zero"), "--warmup-start above_zero", "--warmup-start zero"),
        (with_optim(no_decay="norm"), "--no-decay ''", "--no-decay norm"),
    ],
)
def test_another_search_in_the_folder_is_refused_by_the_flags_that_differ(tmp_path, plan, there, here):
    for before, now, flags in ((PLAN, plan, (there, here)), (plan, PLAN, (here, there))):
        out = tmp_path / flags[0]
        check_folder(before, out)
        with pytest.raises(UserError) as error:
            check_folder(now, out)
        assert str(error.value) == (
            f"{out} holds a search with {flags[0]}, and this one has {flags[1]}: choose another --out, or give the "
            "same settings to continue it"
        )
        check_folder(before, out)


def test_two_rules_of_the_early_end_are_told_apart(tmp_path):
    check_folder(PLAN, tmp_path)
    with pytest.raises(
        UserError, match=r"--early-end \[0.6, 0.4, 3\], and this one has --early-end \[0.6, 0.2, 3\]"
    ):
        check_folder(replace(PLAN, early_end=EarlyEnd(margin=0.2)), tmp_path)


def test_more_trials_repeats_and_another_sampler_are_the_same_search(tmp_path):
    check_folder(PLAN, tmp_path)
    check_folder(replace(PLAN, trials=30, repeats=3, sampler="cma-es"), tmp_path)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", "no JSON", "\xff", '{"identity": []}', '{"identity": {}}', '{"identity": {"steps": 7}}'],
)
def test_a_file_that_is_not_the_plan_of_a_search_is_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="is not the plan of a search; choose another --out"):
        check_folder(PLAN, tmp_path)
    assert path.read_bytes() == content.encode("latin-1")


@pytest.mark.parametrize("command", ["compare", "robustness", "ablation", "scaling"])
def test_a_folder_with_the_report_of_another_command_is_refused(tmp_path, command):
    (tmp_path / f"{command}.json").write_text("{}")
    message = rf"holds the report of {command} \({command}\.json\), .* choose another --out"
    with pytest.raises(UserError, match=message):
        check_folder(PLAN, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{command}.json"]
    check_folder(PLAN, tmp_path / "another")


def test_another_sampler_continues_a_search(tmp_path, whole):
    pytest.importorskip("optuna")
    search(replace(PLAN, trials=8), tmp_path)
    found = trials(search(replace(PLAN, sampler="tpe"), tmp_path))
    assert sum(record.phase == "ratios" for record in found) == 11


def test_a_plan_is_the_same_after_json():
    for plan in (PLAN, replace(PLAN, early_end=None, proxy="none")):
        assert SearchPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_damaged_record_is_named_and_runs_again_without_its_files(tmp_path):
    plan = replace(PLAN, trials=5, repeats=1)
    search(plan, tmp_path)
    record, run = tmp_path / "trials" / "0005.json", tmp_path / "runs" / "0005"
    record.write_text('{"number": 5}')
    with pytest.raises(UserError, match="cannot read the trial") as error:
        TrialStore(tmp_path / "trials")
    assert str(error.value).endswith(f"delete the file and {run} to run the trial again")
    record.unlink()
    shutil.rmtree(run)
    assert len(search(plan, tmp_path).records) == 5
    assert run.is_dir()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trials": 4}, "--trials is 4; expected 5 or more"),
        ({"repeats": 0}, "--repeats is 0; expected 1 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        replace(PLAN, **settings)


def test_the_seeds_of_the_repeats_are_checked_at_the_start():
    def plan(seed, repeats):
        return replace(PLAN, base=replace(BASE, seed=seed), repeats=repeats)

    with pytest.raises(UserError, match="--seed is 4294967294, and --repeats 3 also trains with 4294967296"):
        plan(2**32 - 2, 3)
    assert plan(2**32 - 3, 3).repeats == plan(2**32 - 2, 2).repeats + 1 == 3  # both remedies work


def test_no_workers_are_refused(tmp_path):
    with pytest.raises(UserError, match="--workers must be at least 1; got 0"):
        search(PLAN, tmp_path, workers=0)


def test_a_wrong_number_of_workers_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="--workers must be at least 1; got -1"):
        tune(PLAN, tmp_path / "out", workers=-1, command="", progress=quiet(), worker=WORKER)
    assert not (tmp_path / "out").exists()


_SEARCH = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started with SIGINT ignored
sys.path.insert(0, {here!r})
from pathlib import Path
from support.synthetic_search import PLAN, WORKER, run_search
run_search(PLAN, Path({out!r}), 2, worker=WORKER)
"""


class Interrupting(SearchProgress):
    """Sends a signal while the first trials are running."""

    def __init__(self, number: int) -> None:
        super().__init__(Console(quiet=True))
        self.number = number

    def poll(self, numbers, runs):
        signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_workers_and_the_search_goes_on_later(tmp_path, monkeypatch, whole, number):
    started, start = [], WorkerPool._start

    def recorded(pool, worker):
        started.append(start(pool, worker))
        return started[-1]

    monkeypatch.setattr(WorkerPool, "_start", recorded)
    monkeypatch.setenv("SYNTHETIC_SECONDS", "60")
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            run_search(PLAN, tmp_path, 1, Interrupting(number), worker=WORKER)
    finally:
        signal.signal(signal.SIGINT, before)
    (process,) = started
    assert process.poll() is not None
    monkeypatch.delenv("SYNTHETIC_SECONDS")
    assert trials(search(PLAN, tmp_path)) == whole


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_the_search_goes_on_later(tmp_path, whole):
    script = _SEARCH.format(here=str(Path(__file__).parents[1]), out=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "SYNTHETIC_SECONDS": "60"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("worker-*.log"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(UserError, match="another search is running in"):
        search(PLAN, tmp_path)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)  # returns only when no worker holds the pipe either
    assert process.returncode != 0
    found = trials(search(PLAN, tmp_path))
    assert [record.point for record in found[:3]] == [record.point for record in whole[:3]]
    assert {record.status for record in found} == {"finished"}


def test_without_a_terminal_each_trial_is_one_line(tmp_path, capsys):
    run_search(replace(PLAN, trials=5), tmp_path, 1, worker=WORKER)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tuning one learning rate for all blocks: 2 runs"
    assert lines[1].startswith("trial   1  tune loss ")
    assert "base LR 0.004, warm-up 15%, uniform, seed 0" in lines[1]
    assert lines[3] == "searching the ratios: 3 runs"
    assert len(lines) == 3 + 5 + 2


def test_on_a_terminal_the_running_trials_are_bars(tmp_path):
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    run_search(replace(PLAN, trials=5), tmp_path, 2, SearchProgress(console), worker=WORKER)
    assert "repeating the best with other seeds" in screen.getvalue()
    assert "2/2" in screen.getvalue()
