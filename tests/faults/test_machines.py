"""Machines as they are: poor terminals, no home, other users' folders, file systems without locks, odd names."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_comparison import BASE, synthetic_compare

from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.train.config import ModelConfig, OptimConfig, TrainConfig
from blockwise_lr.train.run import train
from support.commands import call

NOT_UTF8 = os.fsdecode(b"caf\xe9")
USER = 54321  # of no name, as containers run programs


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """text/, tiny.json on it, and run/: in a folder that every user may enter, which pytest's own are not."""
    folder = Path(f"/tmp/blockwise-lr-machines-{os.getpid()}")
    (folder / "text").mkdir(parents=True)
    rng = random.Random(0)
    words = ["the", "of", "and", "“government”", "people", "états", "nation", "congress", "war", "peace"]
    for i in range(16):
        (folder / "text" / f"{i:02}.txt").write_text(" ".join(rng.choices(words, k=60)), "utf-8")
    config = TrainConfig(
        steps=4, batch_size=2, log_every=2, eval_every=0, save_every=2, eval_tokens=32, report_to="none",
        device="cpu", data=DataConfig(data=str(folder / "text")), optim=OptimConfig(warmup_fraction=0.25),
        model=ModelConfig("llama", hidden_size=8, layers=1, heads=2, vocab_size=300, context=16),
    )  # fmt: skip
    (folder / "tiny.json").write_text(json.dumps(config.to_dict()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKWISE_LR_CACHE", str(folder / "cache"))
        train(config, folder / "run")
    yield folder
    shutil.rmtree(folder)


def run(
    *arguments: object,
    program: Sequence[str] = ("-m", "blockwise_lr"),
    user: int | None = None,
    without: tuple[str, ...] = (),
    **environment: str,
) -> subprocess.CompletedProcess[bytes]:
    """`blockwise-lr ARGUMENTS` in a process of its own, as another user, with other variables or without some."""
    line = [sys.executable, *program, *map(os.fsencode, map(str, arguments))]
    if user is not None:
        line = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *line]
    variables = {name: value for name, value in os.environ.items() if name not in without}
    return subprocess.run(
        line, capture_output=True, env={**variables, "OMP_NUM_THREADS": "1", **environment}, timeout=300
    )


def one_line(done: subprocess.CompletedProcess[bytes]) -> str:
    """The message of a command that was refused."""
    err = done.stderr.decode()
    assert (done.returncode, done.stdout) == (2, b""), err
    assert err.startswith("blockwise-lr: ")
    assert err.count("\n") == 1
    return err


TERMINALS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "cp1252": {"PYTHONIOENCODING": "cp1252:strict"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


SEVERAL = """
import sys
from blockwise_lr.cli.entry import main
line = []
for word in [*sys.argv[1:], ";"]:
    if word != ";":
        line.append(word)
        continue
    try:
        main(line)
    except SystemExit as ended:
        if ended.code:
            print("exit code", ended.code, file=sys.stderr)
    print("end of it")
    line = []
"""
"""Runs the commands of its command line, which are separated by semicolons, in one process."""


class TestTerminals:
    @pytest.mark.slow
    @pytest.mark.parametrize("terminal", ["ascii", "cp1252", "C"])
    def test_what_it_lacks_is_printed_as_escapes_and_no_command_needs_it(
        self, place: Path, tmp_path: Path, terminal: str
    ) -> None:
        commands: list[list[object]] = [
            ["generate", place / "run", "--prompt", "“états” ж", "--tokens", "2", "--temperature", "0"],
            ["inspect", place / "run"],
            ["train", place / "tiny.json", "--help"],
            ["eval", place / "run"],
            ["sharpness", place / "run", "--batches", "1", "--out", tmp_path / "sharp"],
        ]
        line = [word for command in commands for word in (*command, ";")][:-1]
        environment = {"BLOCKWISE_LR_CACHE": str(place / "cache"), **TERMINALS[terminal]}
        done = run(*line, program=["-c", SEVERAL], **environment)
        err = done.stderr.decode()
        assert done.returncode == 0, err
        assert b"Traceback" not in done.stderr
        sample, *tables, end = done.stdout.split(b"end of it\n")
        if terminal == "C" and not sample:
            # The command line itself is read as ASCII there: the bytes of the prompt are no characters.
            assert "is not UTF-8 text" in err
            assert err.count("exit code 2") == err.count("exit code") == 1
        else:
            expected = {
                "ascii": rb"\u201c\xe9tats\u201d \u0436",
                "cp1252": "“états”".encode("cp1252") + rb" \u0436",
            }
            assert sample.startswith(expected[terminal])
            assert "exit code" not in err
        assert (len(tables), end) == (4, b"")
        assert all(len(table) > 200 and table.isascii() for table in tables)

    def test_a_users_own_choice_is_kept(self) -> None:
        code = "import sys; from blockwise_lr.cli import entry; entry._run = lambda *_: print('é'); entry.main([])"
        environment = {**os.environ, "PYTHONIOENCODING": "ascii:replace"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
        assert (done.returncode, done.stdout) == (0, b"?\n")


def needs_another_user() -> None:
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("another user's process needs root and setpriv")
    probe = [
        "setpriv",
        f"--reuid={USER}",
        f"--regid={USER}",
        "--clear-groups",
        sys.executable,
        "-c",
        "import torch",
    ]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("another user cannot use this Python")


@pytest.fixture(scope="module")
def other() -> int:
    needs_another_user()
    return USER


@pytest.fixture
def theirs(place: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder of the other user."""
    folder = place / "theirs"
    folder.mkdir()
    os.chown(folder, USER, USER)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
class TestOtherUsers:
    def test_no_home_says_what_to_set_and_that_works(self, other: int, place: Path, theirs: Path) -> None:
        arguments = ("train", place / "tiny.json", "--out", theirs / "run")
        without = ("HOME", "XDG_CACHE_HOME", "BLOCKWISE_LR_CACHE")
        err = one_line(run(*arguments, user=other, without=without))
        assert (
            "there is no home folder for the cache of tokens: name a folder with $BLOCKWISE_LR_CACHE" in err
        )
        assert not (theirs / "run").exists()
        done = run(*arguments, user=other, without=without, XDG_CACHE_HOME=str(theirs / "cache"))
        assert done.returncode == 0, done.stderr.decode()
        assert (theirs / "cache" / "blockwise-lr" / "tokens").is_dir()

    def test_a_cache_that_may_only_be_read_serves_what_is_in_it(
        self, other: int, place: Path, theirs: Path
    ) -> None:
        cache = {"BLOCKWISE_LR_CACHE": str(place / "cache")}
        done = run("train", place / "tiny.json", "--out", theirs / "run", user=other, **cache)
        assert done.returncode == 0, done.stderr.decode()
        new = ("train", place / "tiny.json", "--out", theirs / "new", "--vocab-size", "290")
        err = one_line(run(*new, user=other, **cache))
        assert f"the cache folder {place / 'cache'} cannot be used by this user" in err
        assert "Permission denied): choose another with $BLOCKWISE_LR_CACHE" in err

    @pytest.mark.slow
    def test_a_cache_that_may_not_be_entered(self, other: int, place: Path, theirs: Path) -> None:
        cache = place / "closed"
        (cache / "tokens").mkdir(parents=True)
        (cache / "tokenizers").mkdir()
        cache.chmod(0o700)
        arguments = ("train", place / "tiny.json", "--out", theirs / "run")
        err = one_line(run(*arguments, user=other, BLOCKWISE_LR_CACHE=str(cache)))
        assert "choose another with $BLOCKWISE_LR_CACHE" in err

    @pytest.mark.slow
    def test_an_entry_that_may_not_be_read(self, other: int, place: Path, theirs: Path) -> None:
        cache = shutil.copytree(place / "cache", place / "entries")
        for path in cache.rglob("header.json"):
            path.chmod(0o600)
        arguments = ("train", place / "tiny.json", "--out", theirs / "run")
        err = one_line(run(*arguments, user=other, BLOCKWISE_LR_CACHE=str(cache)))
        assert "header.json: Permission denied): choose another with $BLOCKWISE_LR_CACHE" in err

    def test_an_out_or_a_text_that_is_not_theirs(self, other: int, place: Path, theirs: Path) -> None:
        (place / "mine").mkdir()
        cache = {"BLOCKWISE_LR_CACHE": str(theirs / "cache")}
        err = one_line(run("train", place / "tiny.json", "--out", place / "mine", user=other, **cache))
        assert f"the folder {place / 'mine'} cannot be written by this user: choose another --out" in err
        hidden = shutil.copytree(place / "text", place / "hidden")
        (hidden / "03.txt").chmod(0o600)
        arguments = ("train", place / "tiny.json", "--out", theirs / "run", "--data", hidden)
        err = one_line(run(*arguments, user=other, **cache))
        assert (
            f"{hidden / '03.txt'} cannot be read (Permission denied): make it readable for this user" in err
        )


SHIM = """
#include <errno.h>
#include <stdlib.h>
int flock(int fd, int operation) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
"""

HOLD = """
import sys, time
from pathlib import Path
from blockwise_lr.locks import HeldError, take_lock
try:
    lock = take_lock(Path(sys.argv[1]))
except HeldError as held:
    print("held" + held.advice)
else:
    print("taken", flush=True)
    time.sleep(float(sys.argv[2]))
    lock.release()
"""


@pytest.fixture(scope="module", params=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def without_locks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a process whose system has no flock, as on Lustre without the mount option, or NFS without lockd."""
    import errno

    if sys.platform != "linux" or not shutil.which("gcc"):
        pytest.skip("needs LD_PRELOAD and a C compiler")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    command = ["gcc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c"]
    subprocess.run(command, check=True)
    return {"LD_PRELOAD": str(folder / "shim.so"), "FLOCK_ERRNO": str(getattr(errno, request.param))}


class TestWithoutLocks:
    def hold(self, path: Path, seconds: float, environment: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path), str(seconds)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def test_a_file_is_the_lock(self, without_locks: dict[str, str], tmp_path: Path) -> None:
        path = tmp_path / ".lock"
        first = self.hold(path, 60, without_locks)
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "taken\n"
            said, _ = self.hold(path, 0, without_locks).communicate(timeout=60)
            marker = said.partition("remove ")[2].rstrip(")\n")
            assert said == f"held (if there is none on any machine, remove {marker})\n"
            assert Path(marker).exists()
        finally:
            first.send_signal(signal.SIGKILL)
            first.wait()
        said, _ = self.hold(path, 0, without_locks).communicate(timeout=60)
        if said != "taken\n":  # the first look at the marker of a dead process may only find it
            said, _ = self.hold(path, 0, without_locks).communicate(timeout=60)
        assert said == "taken\n"

    @pytest.mark.slow
    def test_a_run_is_trained(self, without_locks: dict[str, str], place: Path, tmp_path: Path) -> None:
        if without_locks["FLOCK_ERRNO"] != "37":  # ENOLCK; the others would take the same way
            pytest.skip("one is enough")
        done = run(
            "train", place / "tiny.json", "--out", tmp_path / "run", **without_locks,
            BLOCKWISE_LR_CACHE=str(tmp_path / "cache"), TMPDIR=str(tmp_path / "no-such-folder"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()
        assert b"Warning" not in done.stderr
        assert not list(tmp_path.rglob("*.held"))


class TestNamesThatAreNotText:
    @pytest.mark.slow
    def test_of_a_text(self, place: Path, tmp_path: Path) -> None:
        data = shutil.copytree(place / "text", tmp_path / NOT_UTF8)
        (data / "03.txt").rename(data / f"{NOT_UTF8}.txt")
        arguments = ("train", place / "tiny.json", "--out", tmp_path / "run", "--data", data)
        done = run(*arguments, BLOCKWISE_LR_CACHE=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr.decode()
        content = json.loads((tmp_path / "run" / "config.json").read_text())
        assert content["train"]["data"]["data"] == content["data"]["source"] == str(data)
        done = run("eval", tmp_path / "run", "--data", data)
        assert done.returncode == 0, done.stderr.decode()

    def test_of_a_text_in_a_comparisons_reports(self, tmp_path: Path) -> None:
        text = tmp_path / NOT_UTF8
        text.mkdir()
        (text / "a.txt").write_text("a")
        base = replace(BASE, data=replace(BASE.data, data=str(text)))
        arms = ["a=adamw:uniform", "b=adamw:paper"]
        synthetic_compare(tmp_path / "out", arms, base=base, command=f"compare quickstart --data {text}")
        assert json.loads((tmp_path / "out" / "compare.json").read_text())["config"]["data"]["data"] == str(
            text
        )
        for name in ("report.md", "report.html"):
            assert r"caf\udce9" in (tmp_path / "out" / name).read_text("utf-8")

    @pytest.mark.parametrize(
        "command",
        ["train {place}/tiny.json --out {name}", "compare {place}/tiny.json --out {name}",
         "export {place}/run --out {name}", "sharpness {place}/run --batches 2 --out {name}"],
    )  # fmt: skip
    def test_of_an_out_is_refused(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setenv("BLOCKWISE_LR_CACHE", str(place / "cache"))
        name = tmp_path / NOT_UTF8
        code, out, err = call(capsys, *command.format(place=place, name=name).split())
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert f"--out {str(name)!a} is not text in the encoding of file names here" in err
        assert not name.exists()

    @pytest.mark.parametrize("command", ["eval", "generate", "inspect", "sharpness", "export"])
    def test_of_a_model_is_refused(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
    ) -> None:
        name = shutil.copytree(place / "run", tmp_path / NOT_UTF8)
        out = ("--out", str(tmp_path / "out")) if command in ("sharpness", "export") else ()
        code, _, err = call(capsys, command, str(name), *out)
        if code == 0:  # where nothing stands in the way of it
            assert command in ("inspect", "export")
            return
        assert (code, err.count("\n")) == (2, 1), err
        assert "is not text in the encoding of file names here" in err


def test_a_read_only_file_system(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system needs to be root")
    try:
        code, _, err = call(capsys, "train", place / "tiny.json", "--out", disk)
        assert (code, err.count("\n")) == (2, 1)
        assert "cannot be written by this user: choose another --out" in err
        code, _, err = call(capsys, "train", place / "tiny.json", "--out", disk / "run")
        assert (code, err.count("\n")) == (2, 1)
        assert "cannot be made (Read-only file system): choose another --out" in err
    finally:
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run(["umount", disk], check=True)
