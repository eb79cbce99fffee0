"""How a command starts and ends: without torch where it is not needed, and never with a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from blockwise_lr.train.config import TrainConfig
from faults.processes import wait_for, written

LINE = "blockwise-lr: interrupted: run the same command again to resume"
HEAVY = ("torch", "numpy", "transformers", "datasets")

# SIGINT may be ignored where tests run in the background. The hook sends a signal to its own process when it is about
# to import a module for the first time.
PROGRAM = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)

class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("SIGNAL_AT_IMPORT"):
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Hook())
from blockwise_lr.cli.entry import main
main()
"""


def run(
    *arguments: object,
    when: Callable[[], object] | None = None,
    number: signal.Signals = signal.SIGINT,
    **environment: str,
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in a process of its own, sent the signal once it is so."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )
    try:
        if when is not None:
            wait_for(lambda: bool(when()), process, 200)
            process.send_signal(number)
        out, err = process.communicate(timeout=200)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def modules_after(*arguments: str) -> set[str]:
    """The modules of HEAVY that a command has imported by its end."""
    code = (
        "import sys\nfrom blockwise_lr.cli.entry import main\ntry: main()\n"
        f"finally: print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return set(json.loads(done.stderr.splitlines()[-1].replace("'", '"')))


class TestStart:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["--version"],
            ["--help"],
            [],
            *([command, "--help"] for command in ("train", "compare", "tune", "eval", "generate", "export")),
            ["compare", "llama-134m", "--help"],
            ["sharpness", "--help"],
            ["inspect", "--help"],
            ["presets"],
            ["trian"],
            ["train", "quikstart"],
            ["train", "quickstart", "--stps", "3"],
        ],
        ids=" ".join,
    )
    def test_what_needs_no_model_imports_no_torch(self, arguments: list[str]) -> None:
        assert modules_after(*arguments) == set()

    def test_the_public_names_are_imported_at_first_use(self) -> None:
        code = """
import sys
import blockwise_lr
assert "torch" not in sys.modules
assert set(blockwise_lr.__all__) <= set(dir(blockwise_lr))
assert "torch" not in sys.modules
from blockwise_lr import AdamMini, Block, param_groups
assert blockwise_lr.optimizers.AdamMini is AdamMini is blockwise_lr.AdamMini
assert blockwise_lr.blocks.Block is Block
assert param_groups is vars(blockwise_lr)["param_groups"]
import pickle
assert pickle.loads(pickle.dumps([Block.QK, AdamMini])) == [Block.QK, AdamMini]
space = {}
exec("from blockwise_lr import *", space)
assert set(blockwise_lr.__all__) <= set(space)
for name in blockwise_lr.__all__:
    assert getattr(blockwise_lr, name) is space[name], name
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_a_name_that_is_not_there_is_an_attribute_error(self) -> None:
        import blockwise_lr

        with pytest.raises(AttributeError, match="module 'blockwise_lr' has no attribute 'param_group'"):
            blockwise_lr.param_group  # noqa: B018
        with pytest.raises(ImportError, match="cannot import name 'param_group'"):
            exec("from blockwise_lr import param_group")


class TestCtrlC:
    @pytest.mark.parametrize(
        ("command", "module"),
        [
            ("train quickstart --help", "tyro"),
            ("train quickstart", "torch"),
            ("compare quickstart", "numpy"),  # torch drops what its import raises
            ("presets", "blockwise_lr.cli.presets"),
        ],
    )
    def test_at_the_start_is_one_line_and_exit_code_130(
        self, tmp_path: Path, command: str, module: str
    ) -> None:
        code, out, err = run(*command.split(), "--out", tmp_path / "run", SIGNAL_AT_IMPORT=module)
        goes_on = ": run the same command again to resume" if "presets" not in command else ""
        assert (code, out, err) == (130, "", f"blockwise-lr: interrupted{goes_on}\n")
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    def test_while_the_text_is_prepared(self, tiny: TrainConfig, tmp_path: Path) -> None:
        texts = tmp_path / "texts"
        texts.mkdir()
        for i in range(16):
            (texts / f"{i}.txt").write_text(" ".join(f"{(7 * j * (i + 3)) % 9973:x}" for j in range(60_000)))
        cache = tmp_path / "cache"
        config = replace(tiny, data=replace(tiny.data, data=str(texts), cache=str(cache)))
        arguments = ("train", written(config, tmp_path), "--out", tmp_path / "run")
        done = run(*arguments, when=lambda: list(cache.glob("*/*.lock")))
        assert done == (130, "", f"{LINE}\n")

    def test_while_training(self, tiny: TrainConfig, tmp_path: Path) -> None:
        arguments = ("train", written(replace(tiny, steps=4000), tmp_path), "--out", tmp_path / "run")
        code, out, err = run(*arguments, when=lambda: list(tmp_path.glob("run/checkpoint-*/manifest.json")))
        assert (code, out, err.splitlines()[-1]) == (130, "", LINE)
        assert "Traceback" not in err

    @pytest.mark.slow
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_in_a_comparison_ends_its_runs(
        self, tiny: TrainConfig, tmp_path: Path, number: signal.Signals, code: int
    ) -> None:
        out = tmp_path / "out"
        arguments = ("compare", written(replace(tiny, steps=4000), tmp_path), "--out", out, "--jobs", "1")
        got, said, err = run(*arguments, when=lambda: list(out.glob("runs/*.log")), number=number)
        assert (got, err) == (code, f"{LINE}\n")
        assert "Traceback" not in said

    def test_in_a_destructor_is_not_dropped(self) -> None:
        code = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from blockwise_lr.cli import entry, interrupts

class Interrupting:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

def run(command, rest):
    interrupts.end_startup()
    Interrupting()
    for _ in range(10**8):
        pass
    print("dropped")

entry._run = run
entry.main()
"""
        done = subprocess.run([sys.executable, "-c", code, "presets"], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "blockwise-lr: interrupted\n")

    def test_of_a_caller_in_the_same_process_works_as_before(self) -> None:
        code = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from blockwise_lr.cli import entry
entry._run = lambda command, rest: os.kill(os.getpid(), signal.SIGINT)
try:
    entry.main(["presets"])
except SystemExit as ended:
    assert ended.code == 130
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "blockwise-lr: interrupted\n")


class TestOutput:
    def shell(self, line: str) -> subprocess.CompletedProcess[str]:
        line = line.replace("blockwise-lr", f"{sys.executable} -m blockwise_lr")
        return subprocess.run(["bash", "-c", line], capture_output=True, text=True)

    def test_a_reader_that_has_seen_enough_is_no_error(self) -> None:
        for command in ("presets", "--help", "compare quickstart --help"):
            done = self.shell(
                f"set -o pipefail; blockwise-lr {command} | head -1 >&2; echo ${{PIPESTATUS[0]}}"
            )
            assert done.stdout == "0\n", command
            assert len(done.stderr.splitlines()) == 1, done.stderr
        done = self.shell("blockwise-lr presets | true; echo ${PIPESTATUS[0]}")
        assert (done.stdout, done.stderr) == ("0\n", "")

    @pytest.mark.slow
    def test_a_run_whose_output_is_not_read_any_more_is_not_done(
        self, tiny: TrainConfig, tmp_path: Path
    ) -> None:
        path = written(tiny, tmp_path)
        done = self.shell(
            f"blockwise-lr train {path} --out {tmp_path / 'run'} | true; echo ${{PIPESTATUS[0]}}"
        )
        assert (done.stdout, "Traceback" in done.stderr) == ("141\n", False)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
    def test_an_output_that_takes_nothing_is_one_line(self) -> None:
        for command in ("presets", "--help", "--version"):
            done = self.shell(f"blockwise-lr {command} > /dev/full")
            assert done.returncode == 1
            assert done.stderr == (
                "blockwise-lr: cannot write the output (No space left on device): make room or print it elsewhere\n"
            )
        done = self.shell("blockwise-lr trian 2> /dev/full")
        assert (done.returncode, done.stdout) == (2, "")

    def test_no_output_at_all(self) -> None:
        done = self.shell("blockwise-lr presets >&-")
        assert (done.returncode, done.stderr) == (0, "")
