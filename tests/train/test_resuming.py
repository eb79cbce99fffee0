"""Going on from a checkpoint: what does not fit is one line, what is no fault of its passes, and all take the same."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blockwise_lr.errors import UserError
from blockwise_lr.train import resuming, run
from faults.processes import written
from support.commands import run_command, run_script

EACH_ITS_OWN = """
import os, sys
from blockwise_lr.cli.entry import main
main(["train", sys.argv[1], "--out", sys.argv[2] + os.environ["RANK"]])
"""


def test_a_tied_name_may_be_missing_and_no_other():
    resuming.check_weights(["head"], [], tied=["head"])
    with pytest.raises(ValueError, match="its file has no gain"):
        resuming.check_weights(["head", "gain"], [], tied=["head"])
    with pytest.raises(ValueError, match="its file has more, which the model lacks"):
        resuming.check_weights([], ["more"], tied=["head"])


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_lack_of_memory_is_not_the_checkpoints(error):
    with pytest.raises(type(error)), resuming.loading("checkpoint-2"):
        raise error


def test_a_lost_process_is_not_the_checkpoints(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="reset"), resuming.loading("checkpoint-2"):
        raise RuntimeError("Connection reset by peer")


def test_a_file_that_cannot_be_read_does_not_ask_to_delete_it():
    with (
        pytest.raises(UserError, match=r"checkpoint-2 cannot be read: PermissionError: denied$"),
        resuming.loading("checkpoint-2"),
    ):
        raise PermissionError("denied")


def test_fsdp_on_a_gpu_with_checkpoints_is_refused(tiny, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UserError, match=r"FSDP was asked for .* cannot be resumed: .* --save-every 0"):
        run._refuse_fsdp(replace(tiny, device="cuda", save_every=2))
    run._refuse_fsdp(replace(tiny, device="cuda", save_every=0))


@pytest.mark.slow
def test_machines_that_see_different_folders_are_told(tiny, tmp_path):
    config = written(replace(tiny, steps=8, save_every=4), tmp_path)
    done = run_command("train", config, "--out", tmp_path / "run0", processes=2)
    assert done.returncode == 0, done.stderr
    (tmp_path / "run0" / "result.json").unlink()
    shutil.copytree(tmp_path / "run0", tmp_path / "run1")
    shutil.rmtree(tmp_path / "run1" / "checkpoint-8")
    script = Path(tmp_path / "script.py")
    script.write_text(EACH_ITS_OWN)
    done = run_script(script, config, tmp_path / "run", processes=2)
    assert done.returncode
    assert "process 0 would go on from checkpoint-8" in done.stderr
    assert "process 1 from checkpoint-4: --out has to be one folder" in done.stderr
