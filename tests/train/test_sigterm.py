"""SIGTERM: the running step ends, a checkpoint is saved, and the same command goes on to the bit."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest

from blockwise_lr.checkpoints.manifest import checkpoint_step, newest_complete
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.sigterm import StopOnSigterm
from faults.processes import report
from support.commands import run_command, start_command


def rows(out):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(out / "metrics.jsonl")]


def terminated(out, *arguments, processes=1, after_step):
    """The command, sent SIGTERM once it has logged this step: exit code and stderr."""
    process = start_command(*arguments, processes=processes)
    while process.poll() is None and (
        not (there := read_metrics(out / "metrics.jsonl")) or there[-1]["step"] < after_step
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    return process.returncode, said


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_was_sent_sigterm_saves_its_step_exits_with_143_and_resumes_to_the_bit(
    tiny, tmp_path, record_property, processes
):
    # Rows are further apart than a step, so that it most likely stops between two of them.
    config = replace(tiny, steps=240, log_every=20, eval_every=40, save_every=0)
    config = replace(config, optim=replace(config.optim, base_lr=3e-3))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    arguments = ("train", tmp_path / "config.json", "--out")
    whole = run_command(*arguments, tmp_path / "whole", processes=processes)
    assert whole.returncode == 0, whole.stderr[-3000:]

    out = tmp_path / "cut"
    code, said = terminated(out, *arguments, out, processes=processes, after_step=40)
    if processes == 1:  # torchrun, which was sent the signal and passed it on, has an exit code of its own
        assert code == 143
    checkpoint, skipped = newest_complete(out)
    assert checkpoint is not None
    assert not skipped
    step = checkpoint_step(checkpoint)
    assert 40 <= step < 240
    lines = [line for line in said.splitlines() if line.startswith("blockwise-lr: ")]
    assert lines == [
        f"blockwise-lr: SIGTERM: saved step {step} in {checkpoint}; the same command goes on from there"
    ]
    assert not (out / "result.json").exists()
    assert (checkpoint / "unlogged.json").exists() == (step % 20 != 0)

    again = run_command(*arguments, out, processes=processes)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"resuming from {checkpoint}" in again.stderr
    assert rows(out) == rows(tmp_path / "whole")
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, tmp_path / "whole")]
    assert results[0] | {"seconds": 0} == results[1] | {"seconds": 0}
    report(
        record_property,
        f"SIGTERM, {processes} process{'es' * (processes - 1)}",
        1,
        "the running step is finished and saved, exit code 143; resumed bit-exactly",
    )


# The handler and its owner
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def before():
    """A handler of somebody else's."""

    def handler(number, frame):
        pass

    previous = signal.signal(signal.SIGTERM, handler)
    yield handler
    signal.signal(signal.SIGTERM, previous)


def test_a_training_that_was_cut_short_and_another_one_give_back_the_first_handler(before):
    stop = StopOnSigterm()
    for _ in range(2):  # Ctrl-C ends a training without an event, and so does an out-of-memory retry
        stop.on_train_begin(None, None, None)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop._received
    stop.on_train_begin(None, None, None)
    assert stop._received  # a signal before the retry still counts
    stop.close()
    assert signal.getsignal(signal.SIGTERM) is before
    stop.on_train_begin(None, None, None)
    assert not stop._received
    stop.close()
    stop.close()
    assert signal.getsignal(signal.SIGTERM) is before
