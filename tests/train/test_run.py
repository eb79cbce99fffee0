"""One training run, from the configuration to a checkpoint that others can load."""

import errno
import json
import math
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM

from blockwise_lr.analysis.evaluate import evaluate_run
from blockwise_lr.checkpoints import manifest
from blockwise_lr.checkpoints.manifest import checkpoints, newest_complete, problem_with, rotate, seal
from blockwise_lr.compare.arms import Arm
from blockwise_lr.compare.write_report import compare
from blockwise_lr.data.prepare import FixedWindows, prepare_data
from blockwise_lr.errors import NonFiniteLossError, UserError
from blockwise_lr.optim import PAPER_RATIOS, cosine
from blockwise_lr.train.checks import check_config
from blockwise_lr.train.evaluate_loss import evaluate_loss
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.run import train
from blockwise_lr.train.run_folder import read_run_config
from support.commands import run_command, start_command


def losses(out):
    """Everything in metrics.jsonl that a resumed run has to repeat to the bit."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(out / "metrics.jsonl")]


@pytest.mark.parametrize("family", ["tiny", "tiny_gpt2"])
def test_a_runs_folder_is_as_specified_and_its_checkpoint_gives_the_logged_loss(request, family, tmp_path):
    config = request.getfixturevalue(family)
    out = tmp_path / "run"
    result = train(config, out, command="blockwise-lr train tiny")

    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(2, 25, 2))
    assert all(
        set(row) == {"step", "tokens", "train_loss", "val_loss", "lr", "grad_norm", "seconds"} for row in rows
    )
    assert [row["val_loss"] is not None for row in rows] == [row["step"] % 4 == 0 for row in rows]
    assert rows[-1]["tokens"] == 24 * 4 * 16 == result["tokens"]
    assert rows[-1]["val_loss"] == result["terminal_val_loss"] < rows[1]["val_loss"]
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)

    page = (Path(__file__).parents[2] / "docs" / "reference" / "run-folder.md").read_text(encoding="utf-8")
    written = {path.name for path in out.rglob("*") if not path.name.startswith("checkpoint-")}
    for name in (*written, *rows[0], *result):
        assert f"`{name}`" in page, name

    about = json.loads((out / "config.json").read_text())
    resolved = check_config(config)
    assert about["train"] == replace(resolved, optim=resolved.optim.resolved()).to_dict()
    assert about["train"]["optim"]["beta2"] == 0.95  # what AdamW ran with, whatever later versions take
    assert {"versions", "git_commit", "hardware", "data", "command", "date", "ratios"} <= set(about)
    assert about["data"]["splits"]["train"]["tokens"] > 0

    checkpoint, skipped = newest_complete(out)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-24"
    assert not skipped
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    data = prepare_data(config.data, vocab_size=config.model.vocab_size, context=config.model.context)
    windows = FixedWindows(data.val, config.model.context, config.eval_tokens)
    assert evaluate_loss(model, windows, batch_size=7) == pytest.approx(result["terminal_val_loss"], abs=1e-4)
    assert evaluate_run(out)["tune_loss"] == pytest.approx(result["terminal_tune_loss"], abs=1e-4)


def test_the_logged_learning_rates_are_those_of_the_update_of_that_step(tiny, tmp_path):
    train(tiny, tmp_path / "run")
    for row in losses(tmp_path / "run"):
        for block, lr in row["lr"].items():
            peak = PAPER_RATIOS.get(block, 1) * 1e-2
            # The update of step n is the (n-1)-th that the schedule was asked for: the first has LR 0.
            assert lr == pytest.approx(
                cosine(row["step"] - 1, peak=peak, warmup_steps=2, total_steps=24, floor=5e-4)
            )


def test_tensorboard_gets_the_learning_rate_of_every_block(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(tiny, steps=4, report_to="tensorboard"), tmp_path / "run")
    (events,) = (tmp_path / "run").rglob("events.out.tfevents*")
    written = EventAccumulator(str(events)).Reload()
    scalars = set(written.Tags()["scalars"])
    assert {f"train/lr/{block}" for block in ("emb", "qk", "vo", "ffn", "norm", "head")} <= scalars
    assert {"train/loss", "eval/loss"} <= scalars
    assert written.Scalars("train/lr/emb")[-1].value == pytest.approx(
        losses(tmp_path / "run")[-1]["lr"]["emb"]
    )


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_losses_and_saves_the_original_layout(tiny_gpt2, tmp_path):
    config = replace(tiny_gpt2, steps=8, precision="fp32", optim=replace(tiny_gpt2.optim, base_lr=1e-3))
    train(config, tmp_path / "eager")
    train(replace(config, compile=True), tmp_path / "compiled")
    for eager, compiled in zip(losses(tmp_path / "eager"), losses(tmp_path / "compiled"), strict=True):
        assert compiled["train_loss"] == pytest.approx(eager["train_loss"], abs=1e-4)
    AutoModelForCausalLM.from_pretrained(tmp_path / "compiled" / "checkpoint-8")
    assert evaluate_run(tmp_path / "compiled")["val_loss"] == pytest.approx(
        losses(tmp_path / "compiled")[-1]["val_loss"], abs=1e-4
    )


def test_the_loss_is_the_mean_over_every_predicted_token(tiny, tmp_path):
    data = prepare_data(tiny.data, vocab_size=300, context=16)
    windows = FixedWindows(data.val, 16, 512)
    from blockwise_lr.train.build_model import build_model

    model = build_model(tiny.model, seed=0).eval()
    with torch.no_grad():
        logits = model(torch.stack([windows[i]["input_ids"] for i in range(len(windows))])).logits
    targets = torch.stack([windows[i]["labels"] for i in range(len(windows))])[:, 1:]
    by_hand = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).item()
    # 5 does not divide the number of windows: an unweighted mean over batches would differ.
    assert evaluate_loss(model, windows, batch_size=5) == pytest.approx(by_hand, abs=1e-6)


def test_evaluating_does_not_change_the_training(tiny, tmp_path):
    train(tiny, tmp_path / "often")
    train(replace(tiny, eval_every=0, save_every=0), tmp_path / "never")
    often, never = losses(tmp_path / "often"), losses(tmp_path / "never")
    assert [row["train_loss"] for row in often] == [row["train_loss"] for row in never]
    assert often[-1]["val_loss"] == never[-1]["val_loss"]


def test_accumulated_micro_batches_train_like_one_batch(tiny, tmp_path):
    tiny = replace(tiny, precision="fp32", steps=8, optim=replace(tiny.optim, base_lr=1e-3))
    train(tiny, tmp_path / "whole")
    train(replace(tiny, batch_size=1, accumulation=4), tmp_path / "parts")
    for whole, part in zip(losses(tmp_path / "whole"), losses(tmp_path / "parts")):
        assert part["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-4)
        assert part["tokens"] == whole["tokens"]


def test_seeds_of_data_and_weights_are_apart(tiny, tmp_path):
    tiny = replace(tiny, steps=4, save_every=0)
    runs = {
        "a": {},
        "data": {"data_seed": 1},
        "init": {"init_seed": 1},
        "same": {"init_seed": 0, "data_seed": 0},
    }
    first = {}
    for name, seeds in runs.items():
        train(replace(tiny, **seeds), tmp_path / name)
        first[name] = losses(tmp_path / name)[0]["train_loss"]
    assert first["same"] == first["a"]
    assert len({first["a"], first["data"], first["init"]}) == 3


@pytest.mark.slow
def test_killed_at_three_random_moments_and_resumed_every_logged_loss_is_bit_equal(tiny, tmp_path):
    tiny = replace(
        tiny, steps=120, log_every=5, eval_every=20, save_every=5, optim=replace(tiny.optim, base_lr=3e-3)
    )
    (tmp_path / "config.json").write_text(json.dumps(tiny.to_dict()))
    arguments = ("train", tmp_path / "config.json", "--out")
    whole = run_command(*arguments, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr

    moments = sorted(random.sample(range(8, 100), 3))
    out = tmp_path / "killed"
    for moment in moments:
        process = start_command(*arguments, out)
        while process.poll() is None and (
            not (rows := read_metrics(out / "metrics.jsonl")) or rows[-1]["step"] < moment
        ):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.15))  # so that some deaths fall inside a save
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "result.json").exists(), "finished before it could be killed"
    last = run_command(*arguments, out)
    assert last.returncode == 0, last.stderr
    assert "resuming from" in last.stderr
    assert losses(out) == losses(tmp_path / "whole"), f"killed around {moments}"
    terminal = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("whole", "killed")]
    assert terminal[0]["terminal_val_loss"] == terminal[1]["terminal_val_loss"]
    assert terminal[0]["terminal_tune_loss"] == terminal[1]["terminal_tune_loss"]


def test_a_gpt2_with_split_qkv_resumes_to_the_bit_over_a_checkpoint_that_is_not_complete(
    tiny_gpt2, tmp_path, capsys
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(tiny_gpt2, whole)
    train(tiny_gpt2, cut)
    # As if killed while saving step 24: the newest complete one is that of step 20.
    (cut / "result.json").unlink()
    (cut / "checkpoint-24" / "manifest.json").unlink()
    train(tiny_gpt2, cut)
    assert (
        "checkpoint-24 is not complete (manifest.json is missing, so saving it was interrupted): passed over"
        in (capsys.readouterr().err)
    )
    assert losses(cut) == losses(whole)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"files": {}}', "lists no files"),
        ("[" * 100_000, "cannot be read"),
        ('{"files": [1]}', "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_a_manifest_that_vouches_for_nothing_is_not_believed(tmp_path, content, said):
    (tmp_path / "manifest.json").write_text(content)
    assert problem_with(tmp_path) == f"manifest.json {said}"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), "bytes instead of"),
        (
            lambda f: f.write_bytes(bytes([f.read_bytes()[0] ^ 1]) + f.read_bytes()[1:]),
            "does not have the checksum",
        ),
        (lambda f: f.unlink(), "is missing"),
    ],
)
def test_a_damaged_checkpoint_is_seen(tiny, tmp_path, damage, said):
    train(replace(tiny, steps=4), tmp_path / "run")
    (checkpoint,) = checkpoints(tmp_path / "run")
    assert problem_with(checkpoint) is None
    damage(checkpoint / "model.safetensors")
    assert said in problem_with(checkpoint)
    with pytest.raises(UserError, match="no complete checkpoint in .*; checkpoint-4 is not complete"):
        evaluate_run(tmp_path / "run")


def test_only_the_newest_complete_checkpoints_are_kept(tiny, tmp_path):
    train(tiny, tmp_path / "run")
    assert [c.name for c in checkpoints(tmp_path / "run")] == ["checkpoint-20", "checkpoint-24"]


def test_a_run_killed_after_its_last_checkpoint_only_evaluates(tiny, tmp_path):
    result = train(tiny, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    again = train(tiny, tmp_path / "run")
    assert {**again, "seconds": 0} == {**result, "seconds": 0}


@pytest.mark.parametrize("left", [0, 3])
def test_a_result_without_the_last_row_has_the_loss_of_the_last_step(tiny, tmp_path, left):
    result = train(tiny, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(rows[:left]))
    again = train(tiny, tmp_path / "run")
    assert {**again, "seconds": 0} == {**result, "seconds": 0}


def test_a_finished_run_is_left_alone_and_said_so(tiny, tmp_path, capsys):
    result = train(replace(tiny, steps=4), tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.json*")}
    assert train(replace(tiny, steps=4), tmp_path / "run") == result
    assert "holds this run, finished: nothing to do" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_run_that_went_back_behind_damaged_checkpoints_keeps_what_it_saves_next(tmp_path):
    for step, content in ((20, "whole"), (24, "damaged"), (21, "new")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model").write_text(content)
        seal(folder)
    (tmp_path / "checkpoint-24" / "model").write_text("DAMAGED")
    rotate(tmp_path, keep=2, newest=tmp_path / "checkpoint-21")
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-21"]
    rotate(tmp_path, keep=1, newest=tmp_path / "checkpoint-21")
    assert newest_complete(tmp_path) == (tmp_path / "checkpoint-21", [])


def test_a_file_of_a_checkpoint_that_this_user_may_not_read_is_named(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "model").write_text("whole")
    seal(folder)
    monkeypatch.setattr(manifest, "sha256_of", denied)
    assert problem_with(folder) == "model cannot be read (Permission denied)"


def test_a_checkpoint_that_is_a_link_is_unlinked_and_its_folder_kept(tmp_path):
    for folder in (tmp_path / "disk" / "checkpoint-1", tmp_path / "run" / "checkpoint-2"):
        folder.mkdir(parents=True)
        (folder / "model").write_text("whole")
        seal(folder)
    (tmp_path / "run" / "checkpoint-1").symlink_to(tmp_path / "disk" / "checkpoint-1")
    rotate(tmp_path / "run", keep=1, newest=tmp_path / "run" / "checkpoint-2")
    assert [c.name for c in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert problem_with(tmp_path / "disk" / "checkpoint-1") is None


def test_a_non_finite_loss_stops_the_run_with_what_to_do(tiny, tmp_path):
    wild = replace(tiny, optim=replace(tiny.optim, base_lr=1e30, weight_decay=0.0))
    message = r"the (loss|gradient) was no longer finite at step \d+: the run diverged; lower --base-lr"
    for _ in range(2):  # asked again, it says so again
        with pytest.raises(NonFiniteLossError, match=message):
            train(wild, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["diverged"]
    assert result["terminal_val_loss"] is None
    # What was saved before is whole.
    assert all(problem_with(c) is None for c in checkpoints(tmp_path / "run"))


def test_a_last_update_that_breaks_the_weights_is_seen_and_not_saved(tiny, tmp_path):
    optim = replace(tiny.optim, base_lr=1e30, warmup_steps=0, weight_decay=0.0)
    config = replace(tiny, steps=1, log_every=1, save_every=0, eval_every=0, optim=optim)
    with pytest.raises(NonFiniteLossError, match="no longer finite at step 1"):
        train(config, tmp_path / "run")
    assert not checkpoints(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["diverged"]


def test_bf16_autocast_reaches_the_model_in_training_and_not_in_evaluation(tiny, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    seen = set()
    forward = LlamaForCausalLM.forward

    def spy(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        seen.add((torch.is_grad_enabled(), out.logits.dtype))
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", spy)
    train(replace(tiny, steps=4, precision="bf16"), tmp_path / "run")
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}


@pytest.mark.slow
def test_two_processes_train_like_one_with_the_same_global_batch(tiny_gpt2, tmp_path):
    one = replace(tiny_gpt2, precision="fp32", optim=replace(tiny_gpt2.optim, base_lr=1e-3), save_every=12)
    two = replace(one, batch_size=2)
    for name, config, processes in (("one", one, 1), ("two", two, 2)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config.to_dict()))
        done = run_command("train", tmp_path / f"{name}.json", "--out", tmp_path / name, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-5)
        assert b["tokens"] == a["tokens"]
        assert (a["val_loss"] is None) == (b["val_loss"] is None)
        assert a["val_loss"] is None or b["val_loss"] == pytest.approx(a["val_loss"], abs=1e-5)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2

    # Under DDP, too, the checkpoint of a split model is in the original layout, and a cut run resumes to the bit.
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "checkpoint-24").state_dict()
    assert "transformer.h.0.attn.c_attn.weight" in saved
    whole = losses(tmp_path / "two")
    (tmp_path / "two" / "result.json").unlink()
    (tmp_path / "two" / "checkpoint-24" / "manifest.json").unlink()
    resumed = run_command("train", tmp_path / "two.json", "--out", tmp_path / "two", processes=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert losses(tmp_path / "two") == whole

    # With another number of processes it would be another run.
    (tmp_path / "two" / "result.json").unlink()
    refused = run_command("train", tmp_path / "two.json", "--out", tmp_path / "two")
    assert refused.returncode == 2
    assert "was begun with 2 processes and cannot go on with 1" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


class TestBadInput:
    """One clear line each; the command line's exit code for them is tested in tests/test_cli.py."""

    def test_a_folder_of_another_configuration(self, tiny, tmp_path):
        train(replace(tiny, steps=4), tmp_path / "run")
        with pytest.raises(
            UserError,
            match=r"holds a run of another configuration \(optim.base_lr is 0.01 there and 0.02 here",
        ):
            train(replace(tiny, steps=4, optim=replace(tiny.optim, base_lr=2e-2)), tmp_path / "run")

    def test_a_run_of_an_earlier_versions_default_is_named_with_the_flags_that_go_on_with_it(
        self, tiny, tmp_path
    ):
        old = replace(tiny, steps=4, optim=replace(tiny.optim, ratios="paper", base_lr=1e-2))
        train(replace(old, steps=2), tmp_path / "run")
        new = replace(old, optim=replace(old.optim, ratios="half", base_lr=2e-2))
        with pytest.raises(UserError) as error:
            train(new, tmp_path / "run")
        says = str(error.value)
        assert (
            "optim.base_lr is 0.01 there and 0.02 here; optim.ratios is 'paper' there and 'half' here" in says
        )
        assert says.endswith("choose another --out, or run it as it was, with --ratios paper --base-lr 0.01")
        assert train(old, tmp_path / "run")["steps"] == 4  # what the flags ask for
        assert read_run_config(tmp_path / "run").optim.ratios == "paper"

    def test_fsdp_on_the_cpu(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(UserError, match=r"FSDP was asked for .* where accelerate runs DDP instead"):
            train(tiny, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_a_file_in_the_place_of_the_folder(self, tiny, tmp_path):
        (tmp_path / "run").write_text("precious")
        with pytest.raises(UserError, match=r"run cannot be made \(File exists\): choose another --out"):
            train(tiny, tmp_path / "run")
        arms = [Arm.parse("adamw:uniform"), Arm.parse("adamw:paper")]
        with pytest.raises(UserError, match=r"run cannot be made \(File exists\): choose another --out"):
            compare(tiny, arms, seeds=(0,), out=tmp_path / "run", command="")
        assert (tmp_path / "run").read_text() == "precious"

    def test_a_folder_of_something_else(self, tiny, tmp_path):
        (tmp_path / "thesis.tex").write_text("precious")
        with pytest.raises(
            UserError, match=r"is not empty \(thesis.tex\) and holds no run: choose another --out"
        ):
            train(tiny, tmp_path)
        assert (tmp_path / "thesis.tex").read_text() == "precious"

    def test_a_folder_in_which_another_process_trains(self, tiny, tmp_path):
        with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="another process is training in"):
            train(tiny, tmp_path)

    def test_a_text_that_changed_under_an_unfinished_run(self, tiny, text, tmp_path):
        import shutil

        copy = tmp_path / "text"
        shutil.copytree(text, copy)
        config = replace(tiny, steps=4, data=replace(tiny.data, data=str(copy)))
        train(config, tmp_path / "run")
        (tmp_path / "run" / "result.json").unlink()
        (copy / "00.txt").write_text("another text " * 500)
        with pytest.raises(UserError, match="the text of the run in .* has changed since it began"):
            train(config, tmp_path / "run")
        with pytest.raises(UserError, match="the text of the run in .* has changed since it began"):
            evaluate_run(tmp_path / "run")

    def test_a_folder_without_a_run_or_whole_checkpoint(self, tiny, tmp_path):
        (tmp_path / "checkpoint-4").mkdir()
        (tmp_path / "checkpoint-4" / "config.json").write_text("{}")
        with pytest.raises(UserError, match=r"the model in .*checkpoint-4 cannot be loaded: .*model_type"):
            evaluate_run(tmp_path / "checkpoint-4")
        (tmp_path / "checkpoint-4" / "manifest.json").write_text("{")
        with pytest.raises(
            UserError, match=r"checkpoint-4 is not a complete checkpoint: manifest.json cannot be read"
        ):
            evaluate_run(tmp_path / "checkpoint-4")
        with pytest.raises(UserError, match=r"holds neither a run nor a model .*such as .*checkpoint-4"):
            evaluate_run(tmp_path)

    def test_a_run_folder_whose_config_json_is_broken(self, tiny, tmp_path):
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(
            UserError, match="config.json cannot be read .*: remove the folder or choose another one"
        ):
            train(tiny, tmp_path)

    def test_a_checkpoint_of_another_model(self, tiny, tmp_path):
        train(replace(tiny, steps=4), tmp_path / "small")
        train(replace(tiny, steps=4, model=replace(tiny.model, hidden_size=32)), tmp_path / "large")
        (tmp_path / "small" / "result.json").unlink()
        (tmp_path / "small" / "checkpoint-4").rename(tmp_path / "old")
        (tmp_path / "large" / "checkpoint-4").rename(tmp_path / "small" / "checkpoint-4")
        with pytest.raises(UserError, match="is of another model: its hidden_size is 32, the run's is 16"):
            train(replace(tiny, steps=4), tmp_path / "small")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"steps": 0}, "--steps is 0; expected 1 or more"),
            ({"batch_size": 0}, "--batch-size is 0; expected 1 or more"),
            ({"keep_checkpoints": 0}, "--keep-checkpoints is 0; expected 1 or more"),
            ({"save_every": 5}, r"--save-every is 5; expected 0 or a multiple of --log-every \(2\)"),
            ({"eval_every": -2}, r"--eval-every is -2; expected 0 or a multiple of --log-every \(2\)"),
            ({"model.context": 1}, "--context is 1; expected 2 or more"),
            ({"model.heads": 3}, "hidden size 16 is not a multiple of 3 heads"),
            ({"model.heads": 4, "model.kv_heads": 3}, "4 heads cannot share 3 key/value heads"),
            ({"model.family": "gpt2"}, "GPT-2 has as many key/value heads as heads"),
            ({"optim.base_lr": math.nan}, "--base-lr is nan; expected a finite number above 0"),
            (
                {"optim.floor_fraction": 1.5},
                "--floor-fraction is 1.5; .* the floor cannot be above the base LR",
            ),
            ({"optim.warmup_fraction": 1.0}, "--warmup-fraction is 1.0; expected 0 or more and below 1"),
            ({"optim.warmup_steps": 24}, "warm-up takes 24 steps, but the run has total_steps=24"),
            ({"optim.warmup_steps": 10, "optim.schedule": "wsd"}, "warm up for at most 8 steps"),
            ({"optim.ratios": "papper"}, "ratios: 'papper' is no file and none of"),
            ({"optim.optimizer": "adamm"}, "no optimizer named 'adamm'; there are adamw"),
            ({"optim.no_decay": "norms"}, "--no-decay: 'norms' is not a valid Block"),
            ({"optim.beta1": 1.5}, "--beta1 is 1.5; expected 0 or more and below 1"),
            ({"optim.eps": 0.0}, "--eps is 0.0; expected a finite number above 0"),
            ({"optim.weight_decay": -1.0}, "--weight-decay is -1.0; expected a finite number, 0 or above"),
            ({"optim.clip": -1.0}, "--clip is -1.0; expected 0 or more"),
            ({"eval_tokens": -1}, "--eval-tokens is -1; expected 0 or more"),
            ({"model.kv_heads": 0}, "--kv-heads is 0; expected 1 or more"),
            (
                {"report_to": "paper"},
                "--report-to: transformers cannot report to 'paper'; it knows .*tensorboard",
            ),
            ({"model.vocab_size": 20}, "a byte-level tokenizer needs at least 257"),
            ({"data.data": "no/such/folder"}, "no/such/folder"),
            ({"model.context": 100_000}, "100,?000"),
        ],
    )
    def test_a_setting_out_of_range(self, tiny, tmp_path, changes, message):
        values = tiny.to_dict()
        for path, value in changes.items():
            part, _, name = path.rpartition(".")
            (values[part] if part else values)[name] = value
        from blockwise_lr.train.config import config_from_dict

        with pytest.raises(UserError, match=message) as error:
            train(config_from_dict(values), tmp_path / "run")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run" / "config.json").exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
    def test_a_gpu_where_there_is_none(self, tiny, tmp_path):
        with pytest.raises(UserError, match="--device cuda, but torch sees no GPU here; use --device cpu"):
            train(replace(tiny, device="cuda"), tmp_path / "run")
