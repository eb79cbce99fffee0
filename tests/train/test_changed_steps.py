"""`train --steps` on a run of another length: it goes on by the schedule of the new one, and says so in its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from blockwise_lr.compare import Arm, compare
from blockwise_lr.errors import UserError
from blockwise_lr.optim import block_lr
from blockwise_lr.optim.ratios import PAPER_RATIOS
from blockwise_lr.train.checks import check_config
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.run import train
from support.commands import train_here


def short(tiny, **optim):
    tiny = replace(tiny, steps=6, log_every=1, eval_every=0, save_every=3)
    return replace(tiny, optim=replace(tiny.optim, **{"warmup_steps": 2, **optim}))


def rows(folder: Path):
    return read_metrics(folder / "metrics.jsonl")


def unfinish(folder: Path, step: int) -> None:
    """As if the run had been killed before that step was saved."""
    (folder / "result.json").unlink()
    (folder / f"checkpoint-{step}" / "manifest.json").unlink()


def asked(config, step, block="emb"):
    ratio = PAPER_RATIOS[block]
    return block_lr(
        step,
        peak=ratio * config.optim.base_lr,
        ratio=ratio,
        shape=config.optim.schedule,
        warmup_steps=config.optim.warmup_steps,
        total_steps=config.steps,
        floor=config.optim.base_lr * config.optim.floor_fraction,
    )


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_finished_run_goes_on_by_the_schedule_of_more_steps(tiny, tmp_path, capsys, schedule):
    run = tmp_path / "run"
    config = short(tiny, schedule=schedule)
    first = train(config, run)
    before = rows(run)
    longer = replace(config, steps=12)
    second = train(longer, run, command="blockwise-lr train ... --steps 12")
    said = " ".join(capsys.readouterr().err.split())
    assert "the run of 6 steps goes on from step 6 by the schedule of 12 steps" in said
    after = rows(run)
    assert after[:6] == before
    assert [row["step"] for row in after] == list(range(1, 13))
    for row in after[6:]:
        assert row["lr"]["emb"] == pytest.approx(asked(longer, row["step"] - 1))

    change = {"at_step": 6, "steps": [6, 12]}
    assert second["steps"] == 12
    assert second["changes"] == [change]
    assert second["terminal_val_loss"] == after[-1]["val_loss"]
    assert second["tokens"] == 2 * first["tokens"]
    saved = json.loads((run / "config.json").read_text())
    assert saved["train"] == check_config(longer).to_dict() | {"optim": saved["train"]["optim"]}
    assert saved["changes"] == [{**change, "command": "blockwise-lr train ... --steps 12", "result": first}]
    assert json.loads((run / "result.json").read_text()) == second
    assert train(longer, run) == second  # finished: left alone
    assert "finished: nothing to do" in capsys.readouterr().err


def test_until_it_was_made_longer_it_is_the_longer_run_to_the_bit(tiny, tmp_path):
    # Until a third of the shorter run both schedules are at the peak, and the data are in one order.
    config = short(tiny, schedule="wsd")
    config = replace(config, steps=12)
    whole = replace(config, steps=24)
    train(whole, tmp_path / "whole")

    cut = replace(config, keep_checkpoints=9)
    train(cut, tmp_path / "cut")
    for step in (12, 9, 6):
        (tmp_path / "cut" / f"checkpoint-{step}" / "manifest.json").unlink()
    (tmp_path / "cut" / "result.json").unlink()
    train(replace(cut, steps=24), tmp_path / "cut")
    kept = [(row["step"], row["train_loss"], row["lr"], row["val_loss"]) for row in rows(tmp_path / "cut")]
    assert kept == [
        (row["step"], row["train_loss"], row["lr"], row["val_loss"]) for row in rows(tmp_path / "whole")
    ]


def test_an_unfinished_run_can_be_made_shorter_and_longer_again(tiny, tmp_path):
    config = short(tiny)
    train(config, tmp_path / "run")
    unfinish(tmp_path / "run", 6)
    shorter = replace(config, steps=5)
    result = train(shorter, tmp_path / "run")
    assert result["changes"] == [{"at_step": 3, "steps": [6, 5]}]
    assert rows(tmp_path / "run")[-1]["lr"]["emb"] == pytest.approx(asked(shorter, 4))
    result = train(replace(config, steps=8), tmp_path / "run")
    assert result["changes"] == [{"at_step": 3, "steps": [6, 5]}, {"at_step": 5, "steps": [5, 8]}]
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 9))


def test_killed_while_it_was_made_longer_it_goes_on(tiny, tmp_path):
    run = tmp_path / "run"
    config = short(tiny)
    first = train(config, run)
    longer = replace(config, steps=12)
    second = train(longer, run)
    unfinish(run, 12)
    # Between config.json and the removal of the old result.
    (run / "result.json").write_text(json.dumps(first))
    again = train(longer, run)
    assert again | {"seconds": 0} == second | {"seconds": 0}


def test_as_many_steps_as_are_done_are_an_error(tiny, tmp_path):
    config = short(tiny)
    train(config, tmp_path / "run")
    saved = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(
        UserError,
        match=r"has taken 6 of its 6 steps, and --steps is 5: expected more than 6 to go on, or 6 to leave",
    ):
        train(replace(config, steps=5), tmp_path / "run")
    unfinish(tmp_path / "run", 6)
    with pytest.raises(UserError, match="has taken 3 of its 6 steps, and --steps is 3: expected more than 3"):
        train(replace(config, steps=3), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == saved


def test_nothing_else_may_change_with_the_steps(tiny, tmp_path):
    config = short(tiny)
    train(config, tmp_path / "run")
    for changed, name in (
        (replace(config, batch_size=2), "batch_size is 4 there and 2 here"),
        (
            replace(config, optim=replace(config.optim, base_lr=2e-2)),
            "optim.base_lr is 0.01 there and 0.02 here",
        ),
        (replace(config, optim=replace(config.optim, ratios="uniform")), "optim.ratios is 'paper' there"),
    ):
        with pytest.raises(UserError, match=name):
            train(replace(changed, steps=12), tmp_path / "run")


def test_a_run_that_diverged_does_not_go_on(tiny, tmp_path):
    config = short(tiny)
    train(config, tmp_path / "run")
    result = {"finished": True, "steps": 6, "diverged": True, "diverged_at_step": 4}
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    with pytest.raises(
        UserError, match="the run of 6 steps in .* diverged at step 4: choose another --out for 12"
    ):
        train(replace(config, steps=12), tmp_path / "run")


def test_save_every_may_change_on_the_way(tiny, tmp_path):
    config = replace(short(tiny), keep_checkpoints=9)
    train(config, tmp_path / "run")
    train(replace(config, steps=12, save_every=2), tmp_path / "run")
    found = {int(path.name[11:]) for path in (tmp_path / "run").glob("checkpoint-*")}
    assert found == {3, 6, 8, 10, 12}


@pytest.mark.slow
def test_a_comparison_refuses_a_run_that_was_made_longer(tiny, tmp_path):
    config = replace(short(tiny), steps=4)
    arms = [Arm.parse("adamw:uniform"), Arm.parse("adamw:paper")]
    compare(config, arms, seeds=(0,), out=tmp_path, command="", runner=train_here)
    (folder,) = (tmp_path / "runs").glob("adamw-paper-4steps-*/")
    longer = replace(config, steps=6, optim=replace(config.optim, ratios="paper"))
    train(longer, folder)
    with pytest.raises(
        UserError,
        match=r"was trained to 6 steps by another command, and the comparison needs 4 steps of one schedule",
    ):
        compare(config, arms, seeds=(0,), out=tmp_path, command="")
    (folder / "result.json").unlink()
    with pytest.raises(UserError, match="was trained to 6 steps by another command"):
        compare(config, arms, seeds=(0,), out=tmp_path, command="")
