import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_comparison import BASE, TRAINER, quiet, synthetic_run

from blockwise_lr.compare import Arm, Plan, execute
from blockwise_lr.compare.comparison_progress import ComparisonProgress, format_seconds, last_metrics
from blockwise_lr.compare.execute import run_all
from blockwise_lr.errors import UserError

ARMS = (Arm.parse("adamw:uniform"), Arm.parse("adamw:paper"))
PLAN = Plan(base=BASE, arms=ARMS, seeds=(0,), base_lrs=(1e-3, 2e-3, 4e-3))


def written(out: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}


def test_a_finished_comparison_runs_nothing_when_called_again(tmp_path):
    run_all(PLAN, tmp_path, 2, quiet(), runner=synthetic_run)
    before = written(tmp_path)
    assert len(before) == 9
    run_all(PLAN, tmp_path, 2, quiet(), runner=synthetic_run)
    assert written(tmp_path) == before


def test_more_seeds_run_only_what_is_new(tmp_path):
    run_all(PLAN, tmp_path, 2, quiet(), runner=synthetic_run)
    before = written(tmp_path)
    more = Plan(base=BASE, arms=ARMS, seeds=(0, 1), base_lrs=PLAN.base_lrs)
    run_all(more, tmp_path, 2, quiet(), runner=synthetic_run)
    after = written(tmp_path)
    assert len(after) == 12
    assert before.items() <= after.items()


def test_a_failing_run_is_named_with_its_last_line_and_log_and_the_rest_goes_on_later(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNTHETIC_FAIL", "paper")
    with pytest.raises(UserError) as error:
        run_all(PLAN, tmp_path, 1, quiet(), runner=synthetic_run)
    message = str(error.value)
    assert "\n" not in message
    assert "run adamw-paper-60steps-lr0.001-seed0-" in message
    assert "ended with exit code 2: the text is too short: 3 tokens" in message
    log = Path(message.partition("(log: ")[2].rstrip(")"))
    assert log.read_text() == "some progress\nthe text is too short: 3 tokens\n"
    assert log.parent == tmp_path / "runs"
    before = written(tmp_path)
    monkeypatch.delenv("SYNTHETIC_FAIL")
    run_all(PLAN, tmp_path, 1, quiet(), runner=synthetic_run)
    assert len(written(tmp_path)) == 9
    assert before.items() <= written(tmp_path).items()


def test_a_run_that_ends_without_a_result_is_a_failure(tmp_path):
    with pytest.raises(UserError, match=r"ended with exit code 0 without a result\.json: it printed nothing"):
        run_all(PLAN, tmp_path, 1, quiet(), runner=lambda config, folder: [sys.executable, "-c", ""])


def test_a_run_that_is_killed_says_by_which_signal(tmp_path):
    command = "import os; os.kill(os.getpid(), 9)"
    with pytest.raises(UserError, match="was killed by signal 9"):
        run_all(PLAN, tmp_path, 1, quiet(), runner=lambda config, folder: [sys.executable, "-c", command])


def test_jobs_share_the_cores(tmp_path):
    jobs = 3
    run_all(PLAN, tmp_path, jobs, quiet(), runner=synthetic_run)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    assert {log.read_text() for log in tmp_path.glob("runs/*.log")} == {f"threads {threads}\n"}


def test_no_jobs_is_refused(tmp_path):
    with pytest.raises(UserError, match="--jobs must be at least 1; got 0"):
        run_all(PLAN, tmp_path, 0, quiet(), runner=synthetic_run)


_COMPARISON = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started with SIGINT ignored
sys.path.insert(0, {here!r})
from test_execute import PLAN, run_all, synthetic_run
run_all(PLAN, {out!r}, 2, runner=synthetic_run)
"""


def start_comparison(out: Path) -> subprocess.Popen[str]:
    """A comparison in a process of its own, once two of its runs are running."""
    script = _COMPARISON.format(here=str(TRAINER.parent), out=str(out))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "SYNTHETIC_SECONDS": "60"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("runs/*.log"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_comparison_ends_its_children_says_how_to_go_on_and_goes_on(tmp_path, sent):
    process = start_comparison(tmp_path)
    with pytest.raises(UserError, match="another comparison is running in"):
        run_all(PLAN, tmp_path, 1, quiet(), runner=synthetic_run)
    process.send_signal(sent)
    said, _ = process.communicate(timeout=30)  # returns only when no child holds the pipe either
    assert process.returncode != 0
    assert (
        said.splitlines()[-1]
        == "interrupted with 9 of 9 runs unfinished; run the same command again to resume"
    )
    assert not written(tmp_path)
    run_all(PLAN, tmp_path, 2, quiet(), runner=synthetic_run)
    assert len(written(tmp_path)) == 9


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_start_leaves_no_child_behind(tmp_path, monkeypatch, sent):
    started, start = [], execute._start

    def interrupted(*arguments):
        started.append(start(*arguments))
        signal.raise_signal(sent)
        return started[-1]

    monkeypatch.setattr(execute, "_start", interrupted)
    monkeypatch.setenv("SYNTHETIC_SECONDS", "60")
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            run_all(PLAN, tmp_path, 2, quiet(), runner=synthetic_run)
    finally:
        signal.signal(signal.SIGINT, before)
    (child,) = started
    assert child.poll() is not None


def test_without_a_terminal_each_event_is_one_line(tmp_path, capsys):
    run_all(PLAN, tmp_path, 1, runner=synthetic_run)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tuning base learning rates: 9 runs"
    assert lines[1] == "started   adamw:uniform 2N, base LR 0.001, seed 0, 120 steps"
    assert lines[2].startswith("finished  adamw:uniform 2N, base LR 0.001, seed 0, 120 steps: val loss ")
    assert lines[-1] == "comparison: 3 runs, 3 of them already finished"
    assert len(lines) == 20


def test_on_a_terminal_the_running_runs_are_bars(tmp_path):
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    hostile = (ARMS[0], Arm.parse("[bold]markup[/nonsense]=adamw:paper"))
    plan = Plan(base=BASE, arms=hostile, seeds=(0,))
    run_all(plan, tmp_path, 2, ComparisonProgress(console=console), runner=synthetic_run)
    assert "[bold]markup[/nonsense], base LR 0.0006, seed 0" in screen.getvalue()
    assert "3/3" in screen.getvalue()


def test_a_half_written_line_of_metrics_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_metrics(path) is None
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert last_metrics(path) == {"step": 2}


def test_durations_read_well():
    assert [format_seconds(s) for s in (4.4, 65, 7620)] == ["4 s", "1 min 05 s", "2 h 07 min"]
