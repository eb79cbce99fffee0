"""A disk that is full: one clear line, complete files stay complete, and with room again the run goes on to the bit."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from blockwise_lr.checkpoints.manifest import checkpoints, problem_with
from blockwise_lr.errors import StorageError
from blockwise_lr.files import storing, write_text_atomic
from faults.processes import report, result, rows, written
from support.commands import run_command

# The system refuses to let any file grow beyond a limit, as it refuses all growth on a full disk.
LIMITED = """
import resource, sys
from blockwise_lr.cli.entry import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
main(sys.argv[2:])
"""


def limited(size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(size), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def one_line(done: subprocess.CompletedProcess[str], named: str) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 1, done.stderr
    assert lines[-1].startswith("blockwise-lr: cannot write "), done.stderr
    assert named in lines[-1]
    assert "make room" in lines[-1]
    assert "Traceback" not in done.stderr
    return lines[-1]


@pytest.mark.parametrize(
    ("name", "why"), [("file/report.json", "Not a directory"), ("x" * 250, "File name too long")]
)
def test_a_place_that_cannot_be_written_says_so(tmp_path, name, why):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=rf"cannot write .*{name} \({why}\)"):
        write_text_atomic(tmp_path / name, "text")


# In bytes: the tokens of the tiny run take 49 000 in one file, its weights 72 000, the state of its optimizer 159 000.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "size", "named"),
    [
        ("token shards", 10_000, "shard-00000.bin"),
        ("a checkpoint's weights", 60_000, "checkpoint-4"),
        ("a checkpoint's optimizer state", 100_000, "checkpoint-4"),
    ],
)
def test_one_line_says_which_file(tiny, tmp_path, record_property, what, size, named):
    config = replace(tiny, data=replace(tiny.data, cache=str(tmp_path / "cache")))
    arguments = ("train", written(config, tmp_path), "--out", tmp_path / "run")
    one_line(limited(size, *arguments), named)
    assert not checkpoints(tmp_path / "run")
    assert not list(tmp_path.rglob("*.tmp"))
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    report(
        record_property,
        f"disk full while writing {what}",
        1,
        "a one-line error names the file; once there is room, the same command finishes",
    )


@pytest.mark.slow
def test_metrics_and_the_checkpoints_before_stay_complete(tiny, tmp_path, record_property):
    # The limit is above every file of the first checkpoint, and the metrics reach it before the second.
    config = replace(tiny, steps=620, log_every=1, eval_every=0, save_every=300)
    arguments = ("train", written(config, tmp_path), "--out")
    out, whole = tmp_path / "run", tmp_path / "whole"
    one_line(limited(165_000, *arguments, out), "metrics.jsonl")
    (there,) = checkpoints(out)
    assert problem_with(there) is None
    again = run_command(*arguments, out)
    assert again.returncode == 0, again.stderr
    assert f"resuming from {there}" in again.stderr
    assert run_command(*arguments, whole).returncode == 0
    assert rows(out) == rows(whole)
    assert result(out) == result(whole)
    report(
        record_property,
        "disk full while writing metrics",
        1,
        "a one-line error names the file; the previous checkpoint is intact; resumed bit-exactly",
    )


@pytest.mark.slow
def test_a_file_system_without_room(tiny, tmp_path, record_property):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs to be root")
    try:
        config = replace(tiny, keep_checkpoints=100)
        arguments = ("train", written(config, tmp_path), "--out", disk / "run")
        for _ in range(2):  # the second time it resumes, and the disk is as full
            done = run_command(*arguments)
            assert "No space left" in one_line(done, "checkpoint-") or "disk full" in done.stderr
            there = checkpoints(disk / "run")
            assert there
            assert all(problem_with(checkpoint) is None for checkpoint in there)
        assert subprocess.run(["mount", "-o", "remount,size=9m", disk]).returncode == 0
        assert run_command(*arguments).returncode == 0
    finally:
        subprocess.run(["umount", disk], check=True)
    report(
        record_property,
        "a real file system of 1 MiB that fills up with checkpoints",
        2,
        "a one-line error; no half-written checkpoint; earlier ones are intact; finished once there was room",
    )


def test_what_is_not_about_storage_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="something else"), storing(tmp_path):
        raise RuntimeError("something else")
    gone = tmp_path / "no such place"
    message = r"cannot write .*no such place.*No such file or directory"
    with pytest.raises(StorageError, match=message), storing(gone):
        (gone / "file").write_text("")
