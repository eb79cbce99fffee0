"""Files that are cut short, changed in one bit or gone: seen by checksums; the last complete checkpoint is taken."""

import random
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockwise_lr.checkpoints.manifest import checkpoints, newest_complete, seal
from blockwise_lr.checkpoints.manifest import remove as delete
from blockwise_lr.errors import UserError
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.run import train
from faults.processes import report, result, rows, written
from support.commands import run_command


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def remove(file):
    file.unlink()


DAMAGES = {"truncated": cut, "changed in one random bit": flip, "missing": remove}


@pytest.fixture
def stopped(tiny, tmp_path):
    """A run without its result, with the checkpoints 20 and 24; and the same run, left whole."""
    config = replace(tiny, optim=replace(tiny.optim, base_lr=3e-3))
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return config, tmp_path / "run", tmp_path / "whole"


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damaged_file_of_a_checkpoint_is_seen(stopped, tmp_path, record_property, damage):
    _, run, _ = stopped
    names = [file.name for file in checkpoints(run)[-1].iterdir()]
    assert len(names) > 8
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        DAMAGES[damage](copy / "checkpoint-24" / name)
        found, (reason,) = newest_complete(copy)
        assert found == copy / "checkpoint-20", name
        assert reason.startswith("checkpoint-24 is not complete (")
        assert name in reason
        shutil.rmtree(copy)
    report(
        record_property,
        f"a file of the newest checkpoint {damage}",
        len(names),
        "detected every time; the error names the file, and the previous checkpoint is used",
    )


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


def test_a_checkpoint_of_another_model_or_optimizer_is_one_line(stopped, record_property):
    """Sealed as it is, so its checksums are right."""
    config, run, _ = stopped
    newest, before = run / "checkpoint-24", run / "checkpoint-20"
    whole = {key: value.clone() for key, value in load_file(newest / "model.safetensors").items()}
    gain, head = "model.norm.weight", "lm_head.weight"  # not tied
    wrong = {
        r"RuntimeError: Error.* size mismatch for model\.norm\.weight": {**whole, gain: torch.zeros(3)},
        r"ValueError: its file has no model\.norm\.weight": without(whole, gain),
        r"ValueError: its file has no lm_head\.weight": without(whole, head),
        r"ValueError: its file has more, which the model lacks": {**whole, "more": torch.zeros(3)},
    }
    for says, weights in wrong.items():
        save_file(weights, newest / "model.safetensors", {"format": "pt"})
        seal(newest)
        with pytest.raises(
            UserError, match=rf"checkpoint-24 does not fit the run.* {says}.*, delete it to go on"
        ):
            train(config, run)
    delete(newest)
    (before / "scheduler.pt").rename(newest.with_name("scheduler.pt"))
    seal(before)
    with pytest.raises(
        UserError, match=r"checkpoint-20 does not fit the run.* ValueError: it has no scheduler\.pt"
    ):
        train(config, run)
    newest.with_name("scheduler.pt").rename(before / "scheduler.pt")
    state = torch.load(before / "optimizer.pt", weights_only=True)
    state["param_groups"].pop()
    torch.save(state, before / "optimizer.pt")
    seal(before)
    with pytest.raises(
        UserError,
        match=r"checkpoint-20 does not fit the run.* ValueError: the saved optimizer has other groups",
    ):
        train(config, run)


@pytest.mark.slow
def test_the_run_goes_on_from_the_last_complete_one_to_the_bit(stopped, tmp_path, record_property):
    config, run, whole = stopped
    flip(run / "checkpoint-24" / "model.safetensors")
    done = run_command("train", written(config, tmp_path), "--out", run)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-24 is not complete (model.safetensors does not have the checksum" in done.stderr
    assert f"resuming from {run / 'checkpoint-20'}" in done.stderr
    assert rows(run) == rows(whole)
    assert result(run) == result(whole)
    for checkpoint in checkpoints(run):
        cut(checkpoint / "optimizer.pt")
    (run / "result.json").unlink()
    done = run_command("train", written(config, tmp_path), "--out", run)
    assert done.returncode == 0, done.stderr
    assert "holds no complete checkpoint: starting again from step 0" in done.stderr
    assert rows(run) == rows(whole)
    report(
        record_property,
        "the newest checkpoint damaged, then all of them",
        2,
        "reported; resumes from the last complete checkpoint, or starts again if there is none; bit-equal in both",
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_tokens_that_are_damaged_under_a_run(tiny, tmp_path, record_property, capfd, damage):
    config = replace(tiny, data=replace(tiny.data, cache=str(tmp_path / "cache")))
    arguments = ("train", written(config, tmp_path), "--out", tmp_path / "run")
    train(config, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    before = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (file,) = (tmp_path / "cache").glob("tokens/*/train/*.bin")
    DAMAGES[damage](file)
    done = run_command(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert str(file) in last
    assert "to build it again" in last
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == before
    report(
        record_property, f"a file of tokens {damage} under a run", 1, "refused; the error says what to delete"
    )
