"""Blockwise learning rates in Lightning: the optimizer, its schedule, and the callback."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy

from blockwise_lr import (
    PAPER_RATIOS,
    AdamMini,
    Block,
    clip_grad_norm_by_block,
    cosine_schedule,
    measure_sharpness,
    param_groups,
    scale_by_block,
)
from blockwise_lr.integrations.block_monitor import called_module, check_strategy
from blockwise_lr.integrations.lightning import BlockMonitor, configure_optimizers_by_block, name_groups
from blockwise_lr.optim.curves import block_lr
from blockwise_lr.sharpness.monitor import read_reports
from support import tiny_models

STEPS, LENGTH, LR = 4, 12, 1e-2
BLOCKS = {"emb", "qk", "vo", "ffn", "norm", "pos"}
TOKENS = 2 * 2 * (LENGTH - 1)  # two micro-batches of two sequences

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:lightning.*", "ignore:.*does not have many workers"
)


def row(i):
    ids = torch.randint(40, (LENGTH,), generator=torch.Generator().manual_seed(i))
    return {"input_ids": ids, "labels": ids}


def loader():
    return DataLoader([row(i) for i in range(16)], batch_size=2, shuffle=True)


def held_out():
    return list(DataLoader([row(1000 + i) for i in range(6)], batch_size=3))


class LanguageModel(LightningModule):
    """A GPT-2 with dropout, whose optimizer is made in two lines."""

    def __init__(self, ratios="paper", *, dropout=0.1, **settings):
        super().__init__()
        self.model = tiny_models.gpt2(split=True, use_cache=False, dropout=dropout)
        self.settings = {"ratios": ratios, "warmup_steps": 1, **settings}

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return configure_optimizers_by_block(self, LR, **self.settings)


def fit(folder, module=None, callbacks=(), *, data=None, resume=None, **changes):
    settings = {
        "max_steps": STEPS, "accelerator": "cpu", "devices": 1, "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5, "log_every_n_steps": 1, "logger": CSVLogger(folder, version=0),
        "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks),
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    module = LanguageModel() if module is None else module
    seed_everything(0, verbose=False)
    trainer = Trainer(**{**settings, **changes}, callbacks=list(callbacks))
    trainer.fit(module, loader() if data is None else data, ckpt_path=resume)
    return trainer, module


def logged(folder):
    """The logged values by name and step."""
    (path,) = folder.rglob("metrics.csv")
    table: dict[str, dict[int, float]] = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            for name, value in line.items():
                if value and name not in ("step", "epoch"):
                    table.setdefault(name, {})[int(line["step"])] = float(value)
    return table


def weights(module):
    return {name: value.clone() for name, value in module.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def by_hand():
    """The same training as a plain loop: two micro-batches a step, clipped as a whole."""
    module = LanguageModel()
    optimizer = torch.optim.AdamW(param_groups(module.model, LR, "paper"), lr=LR)
    schedule = cosine_schedule(optimizer, warmup_steps=1, total_steps=STEPS, floor=LR / 20)
    seed_everything(0, verbose=False)
    batches = iter(loader())
    for _ in range(STEPS):
        for _ in range(2):
            (module.model(**next(batches)).loss / 2).backward()
        # In the order of the groups, in which Lightning sums the norm too.
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return module


EVERYTHING = ("fisher", "hutchinson", "empirical", "optimizer")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One run with everything measured, at every step."""
    folder = tmp_path_factory.mktemp("measured")
    monitor = BlockMonitor(held_out(), every=1, estimators=EVERYTHING, tokens_per_step=TOKENS)
    return folder, *fit(folder, callbacks=[monitor, LearningRateMonitor()])


def test_two_lines_and_the_callback_train_as_a_plain_loop_does_to_the_bit(measured):
    _, _, module = measured
    assert same(weights(module), weights(by_hand()))
    assert module.training
    assert module.model.training


def test_relative_to_is_that_of_param_groups():
    module = LanguageModel()
    relative = {"emb": 0.2, "pos": 0.02, "qk": 0.02, "ffn": 0.02, "vo": 0.02, "norm": 1.0, "head": 0.02}
    found = configure_optimizers_by_block(module, LR, "paper", schedule=None, relative_to=relative)
    expected = param_groups(module, LR, "paper", relative_to=relative)
    assert [group["lr"] for group in found["optimizer"].param_groups] == [group["lr"] for group in expected]
    assert max(group["lr"] for group in expected) == pytest.approx(
        100 * LR
    )  # EMB: its ratio, 10, and 0.2 over 0.02


def test_every_logger_gets_the_rates_and_ratios_of_the_step_that_used_them(measured):
    table = logged(measured[0])
    for block in BLOCKS:
        ratio = PAPER_RATIOS.get(Block(block), 1.0)
        shape = {"shape": "cosine", "warmup_steps": 1, "total_steps": STEPS, "floor": LR / 20}
        expected = [block_lr(step, peak=ratio * LR, ratio=ratio, **shape) for step in range(STEPS)]
        assert table[f"lr-AdamW/{block}"] == pytest.approx(dict(enumerate(expected)))
        assert table[f"lr/{block}"] == pytest.approx(dict(enumerate(expected)))
        assert table[f"ratio/{block}"] == dict.fromkeys(range(STEPS), ratio)
    assert list(table["loss"]) == list(table["lr/emb"])


def test_every_measurement_is_logged_and_written(measured):
    folder = measured[0]
    reports = read_reports(folder / "lightning_logs/version_0/sharpness.jsonl")
    steps = {name: [r.step for r in reports if r.estimator == name] for name in EVERYTHING}
    assert steps == {
        "fisher": [0, 1, 2, 3, 4], "hutchinson": [0, 1, 2, 3, 4], "empirical": [0, 1, 2, 3], "optimizer": [1, 2, 3, 4],
    }  # fmt: skip
    table = logged(folder)
    for report in reports:
        assert {block.value for block in report} == BLOCKS
        for block, found in report.items():
            assert table[f"sharpness/{report.estimator}/{block.value}"][report.step] == pytest.approx(
                found.mean
            )


def test_the_first_and_the_last_measurement_are_those_of_measure_sharpness(measured):
    folder, _, module = measured
    reports = read_reports(folder / "lightning_logs/version_0/sharpness.jsonl", estimator="fisher")
    for model, report in ((LanguageModel().model, reports[0]), (module.model, reports[-1])):
        expected = measure_sharpness(model, held_out(), step=report.step)
        assert report.to_dict() == expected.to_dict()


def test_empirical_is_that_of_the_gradient_before_clipping(tmp_path):
    class Witness(LanguageModel):
        def on_before_optimizer_step(self, optimizer):
            self.seen = [
                *getattr(self, "seen", []),
                {
                    group["block"]: sum(p.grad.double().square().sum().item() for p in group["params"])
                    for group in optimizer.param_groups
                },
            ]

    monitor = BlockMonitor(
        every=1, estimators="empirical", tokens_per_step=TOKENS, path=tmp_path / "own.jsonl"
    )
    _, module = fit(tmp_path, Witness(), [monitor], gradient_clip_val=1e-3)
    reports = read_reports(tmp_path / "own.jsonl")
    assert len(reports) == len(module.seen) == STEPS
    for report, squares in zip(reports, module.seen):
        for block, found in report.items():
            assert found.mean == pytest.approx(TOKENS * squares[block.value] / found.numel, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_measurement_has_the_precision_of_the_training(precision, tmp_path):
    fit(tmp_path, callbacks=[BlockMonitor(held_out(), at=[0])], precision=precision, max_steps=2)
    (found,) = read_reports(tmp_path / "lightning_logs/version_0/sharpness.jsonl")
    model = LanguageModel().model
    if precision == "bf16-true":
        expected = measure_sharpness(model.to(torch.bfloat16), held_out(), step=0)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            expected = measure_sharpness(model, held_out(), step=0)
    assert found.to_dict() == expected.to_dict()


def checkpoints(folder):
    return ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")


def steady(folder, callbacks=(), *, ratios="paper", resume=None, **settings):
    """A run whose steps all have the same batch, because a DataLoader does not remember where it was."""
    module = LanguageModel(ratios, dropout=0.0, **settings)
    data = DataLoader([row(0)] * 16, batch_size=2)
    return fit(folder, module, callbacks, data=data, resume=resume)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with a checkpoint after two of its four steps."""
    folder = tmp_path_factory.mktemp("saved")
    monitor = BlockMonitor(
        held_out(), every=1, estimators=EVERYTHING, tokens_per_step=TOKENS, path=folder / "run.jsonl"
    )
    return folder, *steady(folder, [monitor, checkpoints(folder)])


def test_a_resumed_run_ends_as_an_uninterrupted_one_to_the_bit(saved, tmp_path):
    folder, whole, module = saved
    shutil.copy(folder / "run.jsonl", tmp_path / "run.jsonl")  # its lines after the checkpoint are to go
    monitor = BlockMonitor(
        held_out(), every=1, estimators=EVERYTHING, tokens_per_step=TOKENS, path=tmp_path / "run.jsonl"
    )
    trainer, resumed = steady(tmp_path, [monitor], resume=folder / "step=2.ckpt")
    assert same(weights(resumed), weights(module))

    def groups(trainer):
        return [{**group, "params": None} for group in trainer.optimizers[0].param_groups]

    def by_step(file):
        return {(report.estimator, report.step): report.to_dict() for report in read_reports(file)}

    assert groups(trainer) == groups(whole)
    assert by_step(tmp_path / "run.jsonl") == by_step(folder / "run.jsonl")
    assert len(read_reports(tmp_path / "run.jsonl")) == len(read_reports(folder / "run.jsonl"))


@pytest.mark.parametrize("schedule", ["cosine", None])
def test_a_run_resumed_with_other_ratios_is_refused_or_goes_on_with_them(schedule, saved, tmp_path):
    checkpoint = saved[0] / "step=2.ckpt"
    refusal = r'base learning rate .*|ratio of qk is 8 there and 1 here.*by on_change="use_new"'
    with pytest.raises(ValueError, match=refusal):
        steady(tmp_path, ratios="uniform", schedule=schedule, resume=checkpoint)
    with pytest.warns(UserWarning, match="goes on with new settings: ratio of"):
        trainer, _ = steady(
            tmp_path, ratios="uniform", schedule=schedule, resume=checkpoint, on_change="use_new"
        )
    assert trainer.global_step == STEPS
    rates = {group["lr"] for group in trainer.optimizers[0].param_groups}
    assert list(rates) == [pytest.approx(LR / 20 if schedule else LR)]


def test_a_checkpoint_of_a_plain_optimizer_is_refused_by_name_or_its_moments_carried_over(tmp_path):
    class Plain(LanguageModel):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=LR)

    fit(tmp_path, Plain(), [checkpoints(tmp_path)], max_steps=2)
    with pytest.raises(ValueError, match="the saved optimizer has groups of .* parameters without names"):
        fit(tmp_path / "blockwise", resume=tmp_path / "step=2.ckpt")
    trainer, _ = fit(
        tmp_path / "adopted", LanguageModel(on_change="use_new"), resume=tmp_path / "step=2.ckpt"
    )
    assert {float(state["step"]) for state in trainer.optimizers[0].state.values()} == {STEPS}


@pytest.mark.parametrize(
    "changed", [{"no_decay": "1d"}, {"optimizer_cls": AdamMini}], ids=["groups", "class"]
)
def test_a_run_resumed_with_other_groups_is_refused_or_carries_its_moments_over(changed, saved, tmp_path):
    checkpoint = saved[0] / "step=2.ckpt"
    with pytest.raises(ValueError, match="the saved optimizer has (other groups|moments of other shapes)"):
        steady(tmp_path, resume=checkpoint, **changed)
    trainer, _ = steady(tmp_path, resume=checkpoint, on_change="use_new", **changed)
    optimizer, moments = trainer.optimizers[0], torch.load(checkpoint, weights_only=True)
    assert {float(state["step"]) for state in optimizer.state.values()} == {STEPS}
    assert len(optimizer.state) == len(moments["optimizer_states"][0]["state"])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [LR / 20] * len(optimizer.param_groups)
    )


def test_the_names_of_groups_are_unique_and_survive_a_checkpoint_without_them(tmp_path):
    module = LanguageModel(no_decay="1d")
    trainer, _ = fit(tmp_path, module, [LearningRateMonitor(), BlockMonitor(), checkpoints(tmp_path)])
    groups = trainer.optimizers[0].param_groups
    decayed = {"emb", "qk", "vo", "ffn", "pos"}
    assert {group["name"] for group in groups} == {
        *decayed,
        "norm",
        "qk-no-decay",
        "vo-no-decay",
        "ffn-no-decay",
    }
    for group in groups:
        assert bool(group["weight_decay"]) == (group["name"] in decayed)
    table = logged(tmp_path)
    assert table["lr-AdamW/qk-no-decay"] == table["lr-AdamW/qk"] == table["lr/qk"]

    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        del group["name"]  # as groups of param_groups were saved
    torch.save(checkpoint, tmp_path / "older.ckpt")
    resumed, _ = fit(tmp_path / "resumed", LanguageModel(no_decay="1d"), resume=tmp_path / "older.ckpt")
    assert [group["name"] for group in resumed.optimizers[0].param_groups] == [
        group["name"] for group in groups
    ]


def test_three_groups_of_one_block_have_three_names():
    groups = [{"block": "emb", "weight_decay": decay} for decay in (0.2, 0.1, 0.0, 0.0)]
    assert [group["name"] for group in name_groups(groups)] == [
        "emb",
        "emb-2",
        "emb-no-decay",
        "emb-no-decay-2",
    ]
    (alone,) = name_groups([{"block": "emb", "weight_decay": 0.0}])
    assert alone["name"] == "emb"


def hooks_of_the_page(**names):
    """Return the hooks that the page shows, by name; `names` are those that its imports would bring."""
    page = Path(__file__).parents[2] / "docs" / "recipes" / "lightning.md"
    namespace = dict(names)
    for code in re.findall(
        r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        exec(compile(code, str(page), "exec"), namespace)
    return namespace


def test_the_pages_own_schedule_and_clipping_run(tmp_path):
    hooks = hooks_of_the_page(
        configure_optimizers_by_block=configure_optimizers_by_block,
        scale_by_block=scale_by_block,
        clip_grad_norm_by_block=clip_grad_norm_by_block,
        OneCycleLR=torch.optim.lr_scheduler.OneCycleLR,
    )

    class Shown(LanguageModel):
        configure_optimizers = hooks["configure_optimizers"]
        configure_gradient_clipping = hooks["configure_gradient_clipping"]

    trainer, _ = fit(tmp_path, Shown(), gradient_clip_val=None)
    (optimizer,) = trainer.optimizers
    bases = [group["lr"] / group["lr_ratio"] for group in optimizer.param_groups]
    assert bases == pytest.approx([bases[0]] * len(bases))
    assert 0 < bases[0] < 1e-3


def test_all_loggers_of_a_trainer_get_everything(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loggers = [CSVLogger(tmp_path / "csv", version=0), TensorBoardLogger(tmp_path / "board", version=0)]
    fit(tmp_path, callbacks=[BlockMonitor(held_out(), every=2)], logger=loggers)
    events = event_accumulator.EventAccumulator(loggers[1].log_dir).Reload()
    table = logged(tmp_path / "csv")
    assert {name for name in table if name.startswith("sharpness/")}
    for name in table:
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(table[name])


def test_a_schedule_of_torch_keeps_the_ratios(tmp_path):
    class Cycled(LanguageModel):
        def configure_optimizers(self):
            found = configure_optimizers_by_block(self, LR, "measured", schedule=None, fused=True)
            cycle = torch.optim.lr_scheduler.OneCycleLR(
                found["optimizer"], LR, self.trainer.estimated_stepping_batches
            )
            return {**found, "lr_scheduler": {"scheduler": scale_by_block(cycle), "interval": "step"}}

    trainer, _ = fit(tmp_path, Cycled())
    (optimizer,) = trainer.optimizers
    bases = [group["lr"] / group["lr_ratio"] for group in optimizer.param_groups]
    assert bases == pytest.approx([bases[0]] * len(bases))
    assert optimizer.defaults["fused"]


def test_clipping_by_block_is_three_lines(tmp_path):
    class Clipped(LanguageModel):
        def on_before_optimizer_step(self, optimizer):
            self.expected = {name: p.grad.clone() for name, p in self.named_parameters()}

        def configure_gradient_clipping(
            self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
        ):
            norms = clip_grad_norm_by_block(self, {"emb": 0.01}, blocks=optimizer.param_groups)
            self.log_dict({f"grad_norm/{block.value}": norm for block, norm in norms.items()})
            factor = 0.01 / (norms[Block.EMB] + 1e-6)
            for name, p in self.named_parameters():
                clipped = self.expected[name] * factor if ".wte." in name else self.expected[name]
                assert torch.allclose(p.grad, clipped, rtol=1e-6, atol=0)

    fit(tmp_path, Clipped(), gradient_clip_val=None, max_steps=2)
    table = logged(tmp_path)
    assert all(norm > 0.01 for norm in table["grad_norm/emb"].values())
    assert {name.removeprefix("grad_norm/") for name in table if name.startswith("grad_norm/")} == BLOCKS


def test_manual_optimization_is_watched_too(tmp_path):
    class Manual(LanguageModel):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer, schedule = self.optimizers(), self.lr_schedulers()
            optimizer.zero_grad()
            self.manual_backward(self.model(**batch).loss)
            optimizer.step()
            schedule.step()

    monitor = BlockMonitor(held_out(), at=[0, 2], estimators=("fisher", "empirical"), tokens_per_step=22)
    settings = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
    fit(tmp_path, Manual(), [monitor, LearningRateMonitor()], **settings)
    reports = read_reports(tmp_path / "lightning_logs/version_0/sharpness.jsonl")
    assert [(r.estimator, r.step) for r in reports] == [
        ("fisher", 0), ("empirical", 0), ("fisher", 2), ("empirical", 2),
    ]  # fmt: skip
    assert list(logged(tmp_path)["lr/emb"]) == list(range(STEPS))


def test_what_is_called_on_a_batch(tmp_path):
    class WithForward(LanguageModel):
        def forward(self, **batch):
            return self.model(**batch)

    class Two(LanguageModel):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(2, 2)

    plain, own, two = LanguageModel(), WithForward(), Two()
    assert called_module(plain) is plain.model
    assert called_module(own) is own
    with pytest.raises(
        ValueError, match=r"Two has no forward and no single .*: define forward, or give .*loss_fn="
    ):
        called_module(two)

    def loss_fn(module, batch):
        return module.model(**batch).loss

    for name, module, settings in (
        ("a", plain, {}),
        ("b", own, {}),
        ("c", LanguageModel(), {"loss_fn": loss_fn}),
    ):
        fit(
            tmp_path,
            module,
            [BlockMonitor(held_out(), at=[0], path=tmp_path / f"{name}.jsonl", **settings)],
            max_steps=2,
        )
    # Names of parameters begin with those of the module that is called; blocks are the same.
    one, other, last = (read_reports(tmp_path / f"{name}.jsonl")[0] for name in "abc")
    assert dict(one) == dict(other) == dict(last)
    assert other.per_parameter == last.per_parameter


def test_without_a_measurement_only_rates_and_ratios_are_logged(tmp_path):
    fit(tmp_path, callbacks=[BlockMonitor()], log_every_n_steps=2)
    table = logged(tmp_path)
    assert list(table["lr/emb"]) == list(table["loss"]) == [1, 3]
    assert not any(name.startswith("sharpness") for name in table)
    assert not list(tmp_path.rglob("sharpness.jsonl"))


def test_a_diverged_model_is_passed_over_with_a_warning(tmp_path):
    class Diverged(LanguageModel):
        def on_train_start(self):
            with torch.no_grad():
                self.model.transformer.wpe.weight.fill_(float("nan"))

    with pytest.warns(UserWarning, match="step 1: sharpness was not measured: the logits are not finite"):
        trainer, _ = fit(tmp_path, Diverged(), [BlockMonitor(held_out(), at=[1])])
    assert trainer.global_step == STEPS


def test_the_number_of_steps_has_to_be_known(tmp_path):
    remedy = r"the number of optimizer steps is not known, because this trainer has no last step .* total_steps=\.\.\."
    with pytest.raises(ValueError, match=remedy):
        fit(tmp_path, max_steps=-1, max_epochs=-1)
    assert fit(tmp_path, LanguageModel(warmup_steps=1000), fast_dev_run=True)[0].global_step == 1
    trainer, _ = fit(tmp_path, max_steps=-1, max_epochs=1)
    assert trainer.global_step == trainer.lr_scheduler_configs[0].scheduler.total_steps == STEPS
    with pytest.raises(ValueError, match=r"because this GPT2LMHeadModel has no trainer: call .*total_steps="):
        configure_optimizers_by_block(LanguageModel().model, LR)
    with pytest.raises(ValueError, match="because this LanguageModel has no trainer"):
        configure_optimizers_by_block(LanguageModel(), LR)
    found = configure_optimizers_by_block(LanguageModel(), LR, total_steps=10)
    default = [group["lr"] for group in param_groups(LanguageModel(), LR)]
    assert [group["initial_lr"] for group in found["optimizer"].param_groups] == default


def test_mistakes_are_explained():
    module = LanguageModel()
    with pytest.raises(ValueError, match=r"""schedule is 'linear'; expected "cosine", "wsd" or None"""):
        configure_optimizers_by_block(module, LR, schedule="linear")
    with pytest.raises(ValueError, match="on_change is 'never'"):
        configure_optimizers_by_block(module, LR, on_change="never")
    with pytest.raises(
        TypeError, match="configure_optimizers_by_block got parameters; expected the model itself"
    ):
        configure_optimizers_by_block(module.parameters(), LR)
    with pytest.raises(
        ValueError, match=r"FSDPStrategy replaces the parameters .*: use strategy=\"ddp\" or Model"
    ):
        check_strategy(FSDPStrategy())
    with pytest.raises(ValueError, match="no step to measure at: give every="):
        BlockMonitor(held_out())
    with pytest.raises(ValueError, match='estimator="fisher" needs batches'):
        BlockMonitor(every=1)
