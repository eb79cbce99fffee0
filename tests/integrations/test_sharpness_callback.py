"""SharpnessCallback in transformers' Trainer and in BlockwiseTrainer."""

import math
from functools import partial

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from blockwise_lr import Block, classify, measure_sharpness
from blockwise_lr.integrations.transformers import BlockwiseTrainer, SharpnessCallback
from blockwise_lr.sharpness.monitor import read_reports
from support import tiny_models

STEPS, LENGTH = 6, 12
TOKENS = 2 * 2 * (LENGTH - 1)  # two micro-batches of two sequences


class Tokens(Dataset):
    def __init__(self, start=0):
        self.start = start

    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = torch.randint(40, (LENGTH,), generator=torch.Generator().manual_seed(self.start + i))
        return {"input_ids": ids, "labels": ids}


def held_out(rows=4):
    data = Tokens(1000)
    return [
        {
            name: torch.stack([data[rows * b + i][name] for i in range(rows)])
            for name in ("input_ids", "labels")
        }
        for b in range(2)
    ]


gpt2 = partial(tiny_models.gpt2, n_positions=LENGTH, use_cache=False)


def arguments(folder, **changes):
    values = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "gradient_accumulation_steps": 2, "warmup_steps": 1, "logging_steps": 2, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.5,
    }  # fmt: skip
    return TrainingArguments(**{**values, **changes})


class Witness:
    """Sums the squares of the gradients itself, where they are whole and nothing has clipped them."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            blocks = classify(self.model)
            sums = dict.fromkeys(blocks.counts(), 0.0)
            for name, parameter in self.model.named_parameters():
                sums[blocks[name]] += parameter.grad.double().square().sum().item()
            self.seen = {**getattr(self, "seen", {}), self.state.global_step: sums}
        return loss


class Plain(Witness, Trainer):
    pass


class Blockwise(Witness, BlockwiseTrainer):
    pass


def run(kind, folder, callback=None, *, model=None, resume=None, **changes):
    model = gpt2(split=True) if model is None else model
    trainer = kind(model, arguments(folder, **changes), train_dataset=Tokens())
    if callback is not None:
        trainer.add_callback(callback(trainer))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def everything(folder, **changes):
    settings = {
        "every": 2, "at": [1], "tokens_per_step": TOKENS,
        "estimators": ("fisher", "hutchinson", "empirical", "optimizer"), **changes,
    }  # fmt: skip
    return lambda trainer: SharpnessCallback(held_out(), log=trainer.log, **settings)


def losses(trainer):
    return [
        {name: row[name] for name in ("loss", "grad_norm", "step", "learning_rate")}
        for row in trainer.state.log_history
        if "loss" in row
    ]


@pytest.mark.parametrize("kind", [Plain, Blockwise])
def test_a_measured_training_is_the_same_to_the_bit(kind, tmp_path):
    # Nothing is clipped: the plain Trainer then needs no line of the log.
    alone = run(kind, tmp_path / "alone", max_grad_norm=1e3)
    state = torch.get_rng_state()
    measured = run(kind, tmp_path / "measured", everything(tmp_path), max_grad_norm=1e3)
    assert torch.equal(torch.get_rng_state(), state)
    expected = alone.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in measured.model.state_dict().items())
    assert losses(measured) == losses(alone)
    assert measured.model.training
    written = {
        (report.estimator, report.step) for report in read_reports(tmp_path / "measured/sharpness.jsonl")
    }
    assert written == {
        *((estimator, step) for estimator in ("fisher", "hutchinson") for step in (0, 1, 2, 4, 6)),
        *(("optimizer", step) for step in (1, 2, 4, 6)),
        *(("empirical", step) for step in (0, 1, 2, 4)),
    }


def test_the_first_and_the_last_line_are_what_measure_sharpness_says(tmp_path):
    trainer = run(Blockwise, tmp_path, everything(tmp_path))
    for model, step in ((gpt2(split=True), 0), (trainer.model, STEPS)):
        for report in read_reports(tmp_path / "sharpness.jsonl"):
            if report.step == step and report.estimator in ("fisher", "hutchinson"):
                expected = measure_sharpness(model, held_out(), estimator=report.estimator, step=step)
                assert {b: e.mean for b, e in report.items()} == {b: e.mean for b, e in expected.items()}


@pytest.mark.parametrize("kind", [Plain, Blockwise])
def test_the_precision_is_that_of_training(kind, tmp_path):
    run(kind, tmp_path, everything(tmp_path, estimators="fisher"), bf16=True, max_steps=2)
    found = read_reports(tmp_path / "sharpness.jsonl")[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = measure_sharpness(gpt2(split=True), held_out())
    full = measure_sharpness(gpt2(split=True), held_out())
    for block, expected in half.items():
        assert found[block].mean == pytest.approx(expected.mean, rel=1e-6, abs=0)
        assert found[block].mean != pytest.approx(full[block].mean, rel=1e-6, abs=0)


@pytest.mark.parametrize("kind", [Plain, Blockwise])
@pytest.mark.parametrize("clip", [0.0, 0.05, 0.67, 1e3], ids=lambda clip: f"clip{clip:g}")
def test_empirical_is_that_of_the_gradient_before_clipping(kind, clip, tmp_path):
    callback = everything(tmp_path, every=1, estimators="empirical")
    trainer = run(kind, tmp_path, callback, max_grad_norm=clip)
    found = read_reports(tmp_path / "sharpness.jsonl")
    assert [report.step for report in found] == list(range(STEPS)) == list(trainer.seen)
    for report in found:
        assert report.samples == TOKENS
        for block, squares in trainer.seen[report.step].items():
            # Exact to the rounding of float32: a clipped gradient was multiplied once and its norm is float32.
            assert report[block].mean == pytest.approx(TOKENS * squares / report[block].numel, rel=2e-6)
    norms = [math.sqrt(sum(squares.values())) for squares in trainer.seen.values()]
    if clip == 0.67:  # some are clipped, some are not
        assert min(norms) < 0.99 * clip < clip < max(norms)


def test_a_plain_trainer_logs_more_only_where_it_clips(tmp_path):
    for folder, clip, steps in (("cut", 0.05, [1, 2, 3, 4, 5, 6]), ("whole", 1e3, [2, 4, 6])):
        callback = everything(tmp_path, every=1, estimators="empirical")
        trainer = run(Plain, tmp_path / folder, callback, max_grad_norm=clip)
        assert [row["step"] for row in losses(trainer)] == steps
    trainer = run(Blockwise, tmp_path / "blockwise", everything(tmp_path, every=1), max_grad_norm=0.05)
    assert [row["step"] for row in losses(trainer)] == [2, 4, 6]


def test_parts_of_a_fused_weight_that_was_not_split_are_told_apart(tmp_path):
    run(Plain, tmp_path, everything(tmp_path, every=6, at=()), model=gpt2(split=False))
    run(Plain, tmp_path / "split", everything(tmp_path, every=6, at=()))
    fused = read_reports(tmp_path / "sharpness.jsonl")
    split = read_reports(tmp_path / "split/sharpness.jsonl")
    assert len(fused) == len(split) == 6
    for a, b in zip(fused, split):
        assert (a.estimator, a.step, set(a)) == (b.estimator, b.step, set(b))
        assert Block.QKV not in a
        if a.step == 0:
            for block in (Block.QK, Block.VO):
                assert a[block].numel == b[block].numel
                if a.estimator != "hutchinson":  # whose random signs belong to parameters
                    assert a[block].mean == pytest.approx(b[block].mean, rel=1e-4)


@pytest.mark.parametrize("kind", [Plain, Blockwise])
def test_tensorboard_gets_every_block_of_every_estimator(kind, tmp_path):
    run(kind, tmp_path, everything(tmp_path), report_to="tensorboard")
    (events,) = tmp_path.rglob("events.out.tfevents*")
    written = EventAccumulator(str(events)).Reload()
    blocks = {"emb", "qk", "vo", "ffn", "norm", "pos"}
    estimators = {"fisher", "hutchinson", "empirical", "optimizer"}
    wanted = {f"train/sharpness/{estimator}/{block}" for estimator in estimators for block in blocks}
    assert wanted <= set(written.Tags()["scalars"])
    scalars = written.Scalars("train/sharpness/fisher/norm")
    found = read_reports(tmp_path / "sharpness.jsonl", estimator="fisher")
    assert [(s.step, pytest.approx(s.value)) for s in scalars] == [(r.step, r["norm"].mean) for r in found]


def test_a_plain_trainer_without_log_writes_the_file_alone(tmp_path):
    trainer = run(Plain, tmp_path, lambda trainer: SharpnessCallback(held_out(), every=3))
    assert not any("sharpness" in name for row in trainer.state.log_history for name in row)
    assert [report.step for report in read_reports(tmp_path / "sharpness.jsonl")] == [0, 3, 6]


def test_a_callback_given_to_the_constructor_is_logged_too(tmp_path):
    callback = SharpnessCallback(held_out(), at=[3])
    trainer = BlockwiseTrainer(
        gpt2(split=True), arguments(tmp_path), train_dataset=Tokens(), callbacks=[callback]
    )
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "sharpness/fisher/emb" in row]
    (report,) = read_reports(tmp_path / "sharpness.jsonl")
    assert row["step"] == report.step == 3
    assert row["sharpness/fisher/emb"] == report["emb"].mean


@pytest.mark.parametrize("kind", [Plain, Blockwise])
def test_a_resumed_training_leaves_the_same_file(kind, tmp_path):
    every = {"every": 1, "at": ()}
    run(kind, tmp_path / "whole", everything(tmp_path, **every), max_grad_norm=0.05)
    saving = {"save_strategy": "steps", "save_steps": 3, "max_grad_norm": 0.05}
    run(kind, tmp_path / "cut", everything(tmp_path, **every), **saving)
    path = tmp_path / "cut" / "sharpness.jsonl"
    path.write_bytes(path.read_bytes()[:-100])  # as a crash would leave it, steps after the checkpoint
    resume = str(tmp_path / "cut" / "checkpoint-3")
    run(kind, tmp_path / "cut", everything(tmp_path, **every), resume=resume, **saving)

    def by_step(file):
        found = {(report.step, report.estimator): report.to_dict() for report in read_reports(file)}
        assert len(found) == len(read_reports(file))
        return found

    assert by_step(path) == by_step(tmp_path / "whole" / "sharpness.jsonl")


@pytest.mark.filterwarnings("ignore:step .* sharpness was not measured")
def test_a_diverged_model_is_passed_over_with_a_warning_and_training_goes_on(tmp_path):
    with pytest.warns(UserWarning, match=r"step 6: sharpness was not measured: the logits are not finite"):
        trainer = run(
            Plain, tmp_path, everything(tmp_path, estimators="fisher"), learning_rate=1e30, max_grad_norm=0.0
        )
    assert trainer.state.global_step == STEPS
    assert read_reports(tmp_path / "sharpness.jsonl")[0].step == 0


def test_batches_that_cannot_be_measured_stop_the_training(tmp_path):
    callback = SharpnessCallback([{"input_ids": torch.zeros(2, 4, dtype=torch.long)}], at=[0])
    with pytest.raises(ValueError, match="the batch has no labels"):
        run(Plain, tmp_path, lambda trainer: callback)


def test_adam_is_needed_for_the_optimizer_estimate(tmp_path):
    callback = everything(tmp_path, estimators="optimizer", at=[1])
    with pytest.raises(ValueError, match="SGD keeps no second moment"):
        run(Plain, tmp_path, callback, optim="sgd")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimators": ()}, r"estimators are \[\]; expected one or more, each once"),
        (
            {"estimators": ("fisher", "fisher")},
            r"estimators are \['fisher', 'fisher'\]; expected one or more",
        ),
        (
            {"estimators": "fish"},
            "estimator is 'fish'; expected one of fisher, empirical, hutchinson, optimizer",
        ),
        ({"every": 0}, "no step to measure at"),
        ({"batches": None}, 'estimator="fisher" needs batches: a few held-out ones'),
        ({"estimators": "empirical"}, 'estimator="empirical" needs tokens_per_step=...'),
        ({"estimators": ("fisher", "optimizer")}, 'estimator="optimizer" needs tokens_per_step=...'),
    ],
)
def test_bad_settings_are_refused_before_training(settings, message):
    with pytest.raises(ValueError, match=message):
        SharpnessCallback(**{"batches": held_out(), "every": 1, **settings})
