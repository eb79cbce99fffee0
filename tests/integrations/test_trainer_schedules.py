"""``lr_scheduler_type`` on blocks, held against transformers' own Trainer."""

import dataclasses
import logging
import math
import warnings
from functools import partial

import pytest
import torch
from transformers import Trainer, TrainingArguments

from blockwise_lr import AutoRule, cosine_schedule, param_groups, scale_by_block, split_fused
from blockwise_lr.integrations import trainer_schedules
from blockwise_lr.integrations.transformers import BlockwiseTrainer, blockwise_optimizer
from blockwise_lr.optim import cosine
from support import tiny_models

STEPS, LR = 12, 1e-3
SLOW = {"norm": 32, "vo": 0.5, "ffn": 2, "qk": 4, "emb": 16, "pos": 2}  # no block at the base rate


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        tokens = torch.arange(index, index + 12) % 40
        return {"input_ids": tokens, "labels": tokens}


gpt2 = partial(tiny_models.gpt2, n_layer=1)


def arguments(folder, **changes):
    values = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": LR,
        "weight_decay": 0.1, "warmup_steps": 3, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    return TrainingArguments(**{**values, **changes})


def blockwise(folder, ratios=None, changes=None, **settings):
    ratios = {} if ratios is None else ratios
    return BlockwiseTrainer(
        split_fused(gpt2()),
        arguments(folder, **(changes or {})),
        train_dataset=Tokens(),
        ratios=ratios,
        **settings,
    )


def rows(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def rates(trainer):
    """The rates of every group at every step of a run, without training: schedule and optimizer alone."""
    optimizer = trainer.create_optimizer()
    schedule = trainer.create_scheduler(STEPS)
    seen = []
    for _ in range(STEPS + 2):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen


MAPPED = {
    "linear": {},
    "cosine": {},
    "cosine cycles": {"num_cycles": 1.5},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"lr_end": 1e-5, "power": 2.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "inverse_sqrt timescale": {"timescale": 7},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_with_min_lr rate": {"min_lr_rate": 0.2},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4, "warmup_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
}


def type_of(case):
    return {"lr_scheduler_type": case.split()[0], "lr_scheduler_kwargs": MAPPED[case] or None}


@pytest.mark.parametrize("case", MAPPED)
def test_a_type_of_trainers_is_what_plain_trainer_gives_times_the_ratio(case, tmp_path):
    plain = Trainer(gpt2(), arguments(tmp_path, **type_of(case)), train_dataset=Tokens())
    expected = [groups[0] for groups in rates(plain)]
    schedule = "trainer" if case == "linear" else None
    uniform = blockwise(tmp_path, {}, type_of(case), schedule=schedule)
    assert rates(uniform) == [[lr] * 6 for lr in expected]  # to the bit
    trainer = blockwise(tmp_path, SLOW, type_of(case), schedule=schedule)
    ratio = [group["lr_ratio"] for group in trainer.create_optimizer().param_groups]
    for found, lr in zip(rates(trainer), expected):
        assert found == pytest.approx([r * lr for r in ratio], rel=1e-12, abs=1e-18)


def test_every_type_that_transformers_builds_of_a_function_of_the_step_is_tried_above():
    from transformers.trainer_utils import SchedulerType

    known = {case.split()[0] for case in MAPPED} | {"reduce_lr_on_plateau", "greedy"}
    assert {each.value for each in SchedulerType} <= known


def test_seven_types_train_in_seven_ways_and_log_the_base_rate(tmp_path):
    seen = {}
    for case in ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"):
        trainer = blockwise(tmp_path, SLOW, type_of(case), schedule="trainer")
        trainer.train()
        plain = Trainer(gpt2(), arguments(tmp_path, **type_of(case)), train_dataset=Tokens())
        expected = [groups[0] for groups in rates(plain)][:STEPS]
        assert [row["learning_rate"] for row in rows(trainer)] == pytest.approx(expected)
        assert [row["lr/norm"] for row in rows(trainer)] == pytest.approx([32 * lr for lr in expected])
        seen[case] = tuple(expected)
    assert len(set(seen.values())) == 5


def test_the_default_is_this_librarys_cosine_and_says_once_that_linear_was_not_taken(tmp_path, caplog):
    trainer_schedules._logged.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            trainer = blockwise(tmp_path, SLOW)
            found = rates(trainer)
    floor = LR / 20
    for step, lrs in enumerate(found):
        for lr, group in zip(lrs, trainer.optimizer.param_groups):
            peak = group["lr_ratio"] * LR
            assert (
                lr == pytest.approx(cosine(step, peak=peak, warmup_steps=3, total_steps=STEPS, floor=floor))
                or not step
            )
    said = [record.getMessage() for record in caplog.records if "lr_scheduler_type" in record.getMessage()]
    assert len(said) == 1
    assert (
        'Set schedule="trainer" to use lr_scheduler_type, or schedule="cosine" to stop this message'
        in said[0]
    )
    trainer_schedules._logged.clear()
    caplog.clear()
    blockwise(tmp_path, SLOW, schedule="cosine")
    assert not [record for record in caplog.records if "lr_scheduler_type" in record.getMessage()]


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [("wsd", "constant"), ("wsd", "cosine"), ("cosine", "inverse_sqrt"), ("cosine", "greedy")],
)
def test_two_schedules_that_contradict_each_other_are_refused_by_name(tmp_path, schedule, kind):
    changes = {"lr_scheduler_type": kind, "eval_strategy": "steps", "eval_steps": 5}
    with pytest.raises(ValueError, match=f"schedule='{schedule}' and lr_scheduler_type='{kind}' ask for two"):
        BlockwiseTrainer(
            split_fused(gpt2()),
            arguments(tmp_path, **changes),
            train_dataset=Tokens(),
            eval_dataset=Tokens(),
            schedule=schedule,
        )


def test_the_default_of_a_class_of_arguments_is_no_choice_of_the_users(tmp_path):
    @dataclasses.dataclass
    class Arguments(TrainingArguments):
        lr_scheduler_type: str = "constant"

    def shape(**changes):
        args = Arguments(str(tmp_path), learning_rate=LR, report_to="none", use_cpu=True, **changes)
        trainer = BlockwiseTrainer(split_fused(gpt2()), args, train_dataset=Tokens())
        trainer.create_optimizer()
        return trainer.create_scheduler(STEPS).shape

    assert shape() == "cosine"
    assert shape(lr_scheduler_type="linear") == "trainer:linear"


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_one_idea_under_two_names_is_no_contradiction(tmp_path, schedule):
    kind = {"cosine": "cosine", "wsd": "warmup_stable_decay"}[schedule]
    trainer = blockwise(tmp_path, SLOW, {"lr_scheduler_type": kind}, schedule=schedule)
    trainer.create_optimizer()
    assert trainer.create_scheduler(STEPS).shape == schedule


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_a_metric_is_refused_and_the_message_says_what_works(tmp_path, kind):
    changes = {"lr_scheduler_type": kind, "eval_strategy": "steps", "eval_steps": 4}
    for schedule in (None, "trainer"):
        with pytest.raises(
            ValueError, match=f"lr_scheduler_type='{kind}' is no function of the step.*cosine_with"
        ):
            BlockwiseTrainer(
                split_fused(gpt2()), arguments(tmp_path, **changes), eval_dataset=Tokens(), schedule=schedule
            )


def test_a_pair_of_your_own_in_plain_trainer_follows_the_metric_block_by_block(tmp_path):
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    model = split_fused(gpt2())
    optimizer = torch.optim.AdamW(param_groups(model, LR), lr=LR)
    plateau = scale_by_block(ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=10.0))
    args = arguments(
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        lr_scheduler_type="reduce_lr_on_plateau",
        metric_for_best_model="loss",
    )
    Trainer(
        model, args, train_dataset=Tokens(), eval_dataset=Tokens(), optimizers=(optimizer, plateau)
    ).train()
    lrs = {group["block"]: group["lr"] for group in optimizer.param_groups}
    assert lrs["norm"] < 6 * LR
    assert lrs["emb"] == pytest.approx(4 / 6 * lrs["norm"])


UNUSED = [
    (
        None,
        {"num_cycles": 2},
        {},
        r"'num_cycles', which lr_scheduler_type='linear' does not use; it takes none",
    ),
    ("constant", {"min_lr": 1e-5}, {}, r"'min_lr', which .*'constant' does not use; it takes none"),
    ("constant_with_warmup", {"a": 1}, {}, r"'a', which .*warmup' does not use; it takes none"),
    (
        "cosine",
        {"num_training_steps": 1},
        {},
        r"'num_training_steps', which .* does not use; it takes num_cycles",
    ),
    (
        "warmup_stable_decay",
        None,
        {},
        r"needs num_decay_steps: lr_scheduler_kwargs=\{\"num_decay_steps\": ...\}",
    ),
    (
        None,
        {"num_cycles": 2},
        {"schedule": "wsd"},
        r"\{'num_cycles': 2\} would not be used with schedule='wsd'",
    ),
    ("cosine", {"num_cycles": 2}, {"schedule": "cosine"}, r"would not be used with schedule='cosine'"),
    (
        "constant",
        None,
        {"floor": 1e-5},
        r"floor=1e-05 applies only to this library's .*lr_scheduler_type='constant' is",
    ),
    ("cosine", None, {"warmup": "equal_slope"}, r"warmup='equal_slope' applies only to this library's"),
    (None, None, {"schedule": "trainer", "floor": 0.0}, r"floor=0.0 applies .*lr_scheduler_type='linear' is"),
    (
        None,
        None,
        {"schedule": "linear"},
        r"schedule is 'linear'; expected \"cosine\", \"wsd\", \"trainer\" or None",
    ),
]


@pytest.mark.parametrize(("kind", "kwargs", "settings", "message"), UNUSED)
def test_a_setting_that_would_not_be_used_is_an_error_when_the_trainer_is_made(
    tmp_path, kind, kwargs, settings, message
):
    changes = {"lr_scheduler_kwargs": kwargs, **({"lr_scheduler_type": kind} if kind else {})}
    with pytest.raises(ValueError, match=message):
        blockwise(tmp_path, SLOW, changes, **settings)


def test_transformers_own_complaint_about_its_settings_comes_through(tmp_path):
    trainer = blockwise(tmp_path, SLOW, {"lr_scheduler_type": "cosine_with_min_lr"})
    trainer.create_optimizer()
    with pytest.raises(ValueError, match="One of min_lr or min_lr_rate should be set"):
        trainer.create_scheduler(STEPS)


def test_min_lr_is_the_base_rates_whatever_the_optimizers_own_default_is(tmp_path):
    trainer = BlockwiseTrainer(
        split_fused(gpt2()),
        arguments(tmp_path, **type_of("cosine_with_min_lr"), learning_rate=5e-4),
        train_dataset=Tokens(),
        ratios=SLOW,
        optimizer_cls_and_kwargs=(torch.optim.RAdam, {}),  # without lr: its default is 1e-3
    )
    last = rates(trainer)[STEPS]
    assert last[0] == pytest.approx(32 * 1e-4)


def test_constant_without_warm_up_says_that_the_warm_up_does_nothing(tmp_path, caplog):
    trainer_schedules._logged.clear()
    trainer = blockwise(tmp_path, SLOW, {"lr_scheduler_type": "constant"})
    trainer.create_optimizer()
    with caplog.at_level(logging.WARNING):
        trainer.create_scheduler(STEPS)
    assert "warmup_steps=3 has no effect, because lr_scheduler_type='constant' has no warm-up" in caplog.text


@pytest.mark.parametrize("case", ["cosine", "warmup_stable_decay", "constant"])
def test_constant_decay_shrinks_every_block_as_the_base_rate_would(tmp_path, case):
    trainer = blockwise(tmp_path, SLOW, type_of(case), decay="constant")
    optimizer = trainer.create_optimizer()
    schedule = trainer.create_scheduler(STEPS)
    for _ in range(STEPS):
        shrinks = [group["lr"] * group["weight_decay"] for group in optimizer.param_groups]
        base = optimizer.param_groups[0]["lr"] / 32
        assert shrinks == pytest.approx([0.1 * base] * len(shrinks))
        optimizer.step()
        schedule.step()


def test_auto_moves_the_ratios_under_a_schedule_of_trainers(tmp_path):
    rule = AutoRule(start=0.1, measurements=6)
    trainer = blockwise(tmp_path, rule, {"lr_scheduler_type": "constant_with_warmup", "max_steps": 30})
    trainer.train()
    moved = trainer.auto.ratios
    assert len({round(ratio, 6) for ratio in moved.values()}) > 2
    for group in trainer.optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["lr_ratio"] * LR)
    assert rows(trainer)[-1]["learning_rate"] == pytest.approx(LR)


def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(tmp_path):
    changes = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}
    whole = blockwise(tmp_path / "a", SLOW, changes)
    whole.train()
    saving = {**changes, "save_strategy": "steps", "save_steps": 5}
    blockwise(tmp_path / "b", SLOW, saving).train()
    resumed = blockwise(tmp_path / "b", SLOW, saving)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other settings.*")
        resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-5"))
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
    assert [row["learning_rate"] for row in rows(resumed)] == [row["learning_rate"] for row in rows(whole)]


def test_a_run_that_goes_on_for_longer_takes_the_new_length_and_says_so(tmp_path):
    changes = {"lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": STEPS}
    blockwise(tmp_path, SLOW, changes).train()
    longer = blockwise(tmp_path, SLOW, {**changes, "max_steps": 3 * STEPS})
    with pytest.warns(UserWarning, match=r"goes on at step 12 with other settings .*: total_steps 12 -> 36$"):
        longer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    expected = [
        LR * 0.5 * (1 + math.cos(math.pi * (step - 3) / (3 * STEPS - 3))) for step in range(STEPS, 3 * STEPS)
    ]
    assert [row["learning_rate"] for row in rows(longer)][STEPS:] == pytest.approx(expected)


def test_a_run_that_goes_on_by_another_schedule_says_so(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5}
    blockwise(tmp_path, SLOW, saving, schedule="cosine").train()
    other = blockwise(tmp_path, SLOW, {**saving, "lr_scheduler_type": "cosine"})
    with pytest.warns(UserWarning, match="shape cosine -> trainer:cosine"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    plain = Trainer(gpt2(), arguments(tmp_path, lr_scheduler_type="cosine"), train_dataset=Tokens())
    expected = [groups[0] for groups in rates(plain)][5:STEPS]
    assert [row["learning_rate"] for row in rows(other)][5:] == pytest.approx(expected)
    back = blockwise(tmp_path, SLOW, saving, schedule="wsd")
    with pytest.warns(UserWarning, match="shape trainer:cosine -> wsd"):
        back.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_plain_trainers_schedule_takes_the_progress_of_ours_and_back(tmp_path):
    ours = blockwise(tmp_path, SLOW, {"lr_scheduler_type": "cosine"})
    plain = Trainer(gpt2(), arguments(tmp_path, lr_scheduler_type="cosine"), train_dataset=Tokens())
    for trainer in (ours, plain):
        trainer.create_optimizer()
        trainer.create_scheduler(STEPS)
    for _ in range(6):
        ours.optimizer.step()
        ours.lr_scheduler.step()
    plain.lr_scheduler.load_state_dict(ours.lr_scheduler.state_dict())
    assert plain.lr_scheduler.last_epoch == 6
    again = blockwise(tmp_path, SLOW, {"lr_scheduler_type": "cosine"})
    again.create_optimizer()
    again.create_scheduler(STEPS).load_state_dict(plain.lr_scheduler.state_dict())
    assert again.lr_scheduler.get_last_lr() == ours.lr_scheduler.get_last_lr()
    assert [g["lr"] for g in again.optimizer.param_groups] == ours.lr_scheduler.get_last_lr()


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_logged_learning_rate_is_the_base_rate_also_where_no_block_has_it(tmp_path, schedule):
    trainer = blockwise(tmp_path, SLOW, schedule=schedule)
    trainer.train()
    reference = blockwise(tmp_path, {}, schedule=schedule)
    expected = [groups[0] for groups in rates(reference)][:STEPS]
    assert [row["learning_rate"] for row in rows(trainer)] == pytest.approx(expected)
    assert rows(trainer)[5]["lr/norm"] != pytest.approx(expected[5])


@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 3), (0.25, 8), (0.0, 0), (3, 3)])
def test_a_share_of_the_run_is_a_warm_up_of_so_many_steps(tmp_path, warmup, steps):
    args = arguments(tmp_path, warmup_steps=warmup)
    assert args.get_warmup_steps(30) == steps
    optimizer = torch.optim.AdamW(param_groups(split_fused(gpt2()), LR), lr=LR)
    assert cosine_schedule(optimizer, warmup_steps=warmup, total_steps=30).warmup_steps == steps
    for changes in ({}, {"lr_scheduler_type": "cosine"}):
        trainer = blockwise(tmp_path, SLOW, {"warmup_steps": warmup, **changes})
        trainer.create_optimizer()
        assert trainer.create_scheduler(30).warmup_steps == steps


def test_epochs_instead_of_steps_give_the_schedule_the_length_of_the_run(tmp_path):
    trainer = blockwise(tmp_path, SLOW, {"max_steps": -1, "num_train_epochs": 2, "warmup_steps": 0.1})
    trainer.train()
    assert trainer.lr_scheduler.total_steps == trainer.state.max_steps == 16
    assert trainer.lr_scheduler.warmup_steps == 2


def test_plain_trainer_with_the_factory_keeps_the_ratios_under_its_own_schedules(tmp_path):
    model = split_fused(gpt2())
    trainer = Trainer(
        model,
        arguments(tmp_path, lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": 1e-5}),
        train_dataset=Tokens(),
        optimizer_cls_and_kwargs=blockwise_optimizer(model, lr=LR, ratios=SLOW),
    )
    for lrs in rates(trainer):
        ratio = [group["lr_ratio"] for group in trainer.optimizer.param_groups]
        assert lrs == pytest.approx([r * lrs[0] / 32 for r in ratio])
