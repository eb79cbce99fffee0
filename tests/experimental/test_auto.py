"""AutoRatios: what moves the ratios, what stays, and that a resumed run goes on to the bit."""

from __future__ import annotations

import copy
import io
import math
from contextlib import suppress

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from blockwise_lr import (
    AdamMini,
    AutoRatios,
    AutoRule,
    Block,
    classify,
    cosine_schedule,
    param_groups,
    split_fused,
    wsd_schedule,
)
from blockwise_lr.experimental.auto_rule import parse_auto
from blockwise_lr.optim.ratios import MEASURED_RATIOS
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig
from blockwise_lr.train.ratio_text import parse_ratios

STEPS = 40


def rule(**options) -> AutoRule:
    """From uniform ratios, by the raw cosine, from the start: what the rule does can be seen in a few steps."""
    return AutoRule(**{"begin": "uniform", "signal": "cosine", "start": 0.0, "stop": 1 / 3, **options})


class Training:
    """A tiny LLaMA or GPT-2 under an optimizer and the rule, one batch a step."""

    def __init__(
        self, by: AutoRule | None = None, family: str = "llama", kind: type = torch.optim.AdamW
    ) -> None:
        config = ModelConfig(family, hidden_size=16, layers=2, heads=2, vocab_size=31, context=12)
        self.model = split_fused(build_model(config, seed=0))
        self.optimizer = kind(param_groups(self.model, lr=1e-2, ratios=by or AutoRule()))
        self.schedule = cosine_schedule(self.optimizer, warmup_steps=4, total_steps=STEPS, floor=1e-3)
        self.auto = AutoRatios(self.optimizer, self.schedule, by)

    def gradients(self) -> None:
        generator = torch.Generator().manual_seed(self.schedule.last_epoch)
        ids = torch.randint(31, (4, 12), generator=generator)
        ids[:, 1::2] = (ids[:, ::2] * 3 + 1) % 31  # something to learn
        self.model(input_ids=ids, labels=ids).loss.backward()

    def run(self, steps: int) -> Training:
        for _ in range(steps):
            self.gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
        return self


def literal_cosines(training: Training) -> dict[Block, float]:
    """From the change of the parameters over the last step, kept by the caller as `before`."""
    blocks = classify(training.model)
    sums: dict[Block, list[float]] = {}
    for name, parameter in training.model.named_parameters():
        group = next(g for g in training.optimizer.param_groups if name in g["names"])
        state = training.optimizer.state[parameter]
        beta1, beta2 = group["betas"]
        t = int(state["step"])
        second = state["exp_avg_sq"]
        for dim, size in enumerate(parameter.shape):  # of Adam-mini: one for each piece
            second = second.repeat_interleave(size // second.shape[dim], dim)
        u = state["exp_avg"] / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + group["eps"])
        total = sums.setdefault(blocks[name], [0.0, 0.0, 0.0])
        for i, (a, b) in enumerate(((parameter.grad, u), (parameter.grad, parameter.grad), (u, u))):
            total[i] += float((a.double() * b.double()).sum())
    return {block: dot / math.sqrt(gg * uu) for block, (dot, gg, uu) in sums.items()}


def test_constant_decay_stays_so_while_the_ratios_move():
    training = Training(rule(gain=40.0, stop=1.0))
    groups = param_groups(training.model, lr=1e-2, ratios=rule(), decay="constant")
    training.optimizer = torch.optim.AdamW(groups)
    training.schedule = cosine_schedule(training.optimizer, warmup_steps=4, total_steps=STEPS, floor=1e-3)
    training.auto = AutoRatios(training.optimizer, training.schedule, rule(gain=40.0, stop=1.0))
    training.run(9)
    assert len({round(ratio, 6) for ratio in training.auto.ratios.values()}) > 3
    decays = [group["lr"] * group["weight_decay"] for group in training.optimizer.param_groups]
    assert decays == pytest.approx([decays[0]] * len(decays), rel=1e-9)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamMini])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ratios_follow_the_cosines_of_gradients_and_last_updates(family, kind):
    training = Training(rule(gain=40.0, stop=1.0), family, kind).run(9)
    before = training.auto.ratios
    training.gradients()
    expected = literal_cosines(training)
    training.optimizer.step()
    assert training.auto.cosines == pytest.approx(expected, rel=1e-4)
    for block, ratio in training.auto.ratios.items():
        change = 40.0 / STEPS * (expected[block] - expected[Block.FFN])
        assert ratio == pytest.approx(before[block] * math.exp(change), rel=1e-4)
    assert len(set(training.auto.ratios.values())) == len(training.auto.ratios)


def test_consistency_is_the_mean_cosine_over_its_root_mean_square():
    training = Training(rule(gain=4.0, signal="consistency", stop=1.0))
    means = dict.fromkeys(training.auto.ratios, (0.0, 0.0))
    for _ in range(6):
        before = training.auto.ratios
        training.run(1)
        cosines = training.auto.cosines
        if not cosines:
            continue
        means = {
            b: (0.8 * m + 0.2 * cosines[b], 0.8 * v + 0.2 * cosines[b] ** 2) for b, (m, v) in means.items()
        }
        z = {b: m / math.sqrt(v) for b, (m, v) in means.items()}
        for block, ratio in training.auto.ratios.items():
            change = 4.0 / STEPS * (z[block] - z[Block.FFN])
            assert ratio == pytest.approx(before[block] * math.exp(change), rel=1e-9)
    assert all(v > 0 for _, v in means.values())


def test_a_run_begins_with_the_measured_ratios_unless_told_otherwise():
    moved = {block: ratio for block, ratio in Training().auto.ratios.items() if ratio != 1}
    assert moved == {block: ratio for block, ratio in MEASURED_RATIOS.items() if ratio != 1}
    assert set(Training(rule()).auto.ratios.values()) == {1.0}
    assert parse_ratios("auto") == dict(MEASURED_RATIOS)
    assert parse_ratios("auto:begin=uniform") == {}


def test_the_anchor_keeps_its_ratio_and_the_mean_stays_one():
    ffn = Training(rule(gain=10.0)).run(12)
    assert ffn.auto.ratios[Block.FFN] == 1.0
    mean = Training(rule(gain=10.0, anchor="mean")).run(12)
    assert sum(map(math.log, mean.auto.ratios.values())) == pytest.approx(0, abs=1e-9)
    assert mean.auto.ratios[Block.FFN] != 1.0


def test_learning_rates_are_the_schedules_for_the_ratios_of_now():
    training = Training(rule(gain=100.0)).run(20)
    at = training.schedule.last_epoch
    for group in training.optimizer.param_groups:
        ratio = training.auto.ratios[Block(group["block"])]
        peak, floor = 1e-2 * ratio, min(1e-3, 1e-2 * ratio)
        assert group["initial_lr"] == pytest.approx(peak)
        share = (at - 4) / (STEPS - 4)
        expected = floor + (peak - floor) * (1 + math.cos(math.pi * share)) / 2
        assert group["lr"] == pytest.approx(expected)


def test_ratios_rest_outside_their_part_of_the_run():
    training = Training(rule(gain=100.0, start=0.25, stop=0.5)).run(10)
    assert set(training.auto.ratios.values()) == {1.0}
    training.run(10)
    found = training.auto.ratios
    assert len(set(found.values())) > 1
    assert training.run(20).auto.ratios == found


def test_an_update_at_learning_rate_zero_is_not_measured():
    training = Training(rule(stop=0.25))
    for start, first in {"above_zero": 1, "zero": 2}.items():
        schedule = cosine_schedule(
            training.optimizer, warmup_steps=4, total_steps=STEPS, floor=1e-3, warmup_start=start
        )
        auto = AutoRatios(training.optimizer, schedule, rule(stop=0.25))
        assert [step for step in range(STEPS) if auto.due(step)] == [*range(first, 10)]


def test_re_measuring_goes_on_after_the_first_part():
    training = Training(rule(gain=20.0, stop=0.25, re_measure=8)).run(10)
    assert [step for step in range(STEPS) if training.auto.due(step)] == [*range(1, 10), 16, 24, 32]
    found = training.auto.ratios
    assert training.run(6).auto.ratios == found
    training.run(1)
    cosines = training.auto.cosines
    for block, ratio in training.auto.ratios.items():  # for all eight steps since the last time
        change = 20.0 * 8 / STEPS * (cosines[block] - cosines[Block.FFN])
        assert ratio == pytest.approx(found[block] * math.exp(change))


@pytest.mark.parametrize("signal", ["cosine", "consistency"])
def test_a_run_that_is_resumed_goes_on_to_the_bit(signal):
    whole = Training(rule(gain=100.0, signal=signal)).run(8)
    saved = io.BytesIO()
    states = {name: getattr(whole, name).state_dict() for name in ("model", "optimizer", "schedule")}
    torch.save(copy.deepcopy(states), saved)
    whole.run(16)
    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    resumed = Training(rule(gain=100.0, signal=signal))
    for name in states:
        getattr(resumed, name).load_state_dict(states[name])
    resumed.run(16)
    assert resumed.auto.ratios == whole.auto.ratios
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters()))


class Bowl(nn.Module):
    """Two quadratic bowls, one of them much too steep for the learning rate that the other one needs."""

    def __init__(self) -> None:
        super().__init__()
        self.steep = nn.Parameter(torch.full((8, 8), 1.0))
        self.wide = nn.Parameter(torch.full((8, 8), 30.0))

    def forward(self) -> Tensor:
        return 50 * self.steep.square().sum() + 0.01 * self.wide.square().sum()


def test_a_block_that_overshoots_slows_down_against_one_that_does_not():
    model = Bowl()
    blocks = classify(model, {"steep": Block.VO, "wide": Block.FFN})
    groups = param_groups(model, lr=0.3, ratios={}, weight_decay=0.0, blocks=blocks)
    optimizer = torch.optim.AdamW(groups, betas=(0.5, 0.95))
    schedule = cosine_schedule(optimizer, warmup_steps=1, total_steps=STEPS)
    auto = AutoRatios(optimizer, schedule, rule(gain=20.0, stop=1.0))
    for _ in range(STEPS):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
        schedule.step()
    assert auto.ratios[Block.FFN] == 1.0
    assert auto.ratios[Block.VO] < 0.3


def test_without_ffn_the_largest_block_is_the_anchor():
    model = nn.ModuleDict(
        {"embed_tokens": nn.Embedding(40, 8), "lm_head": nn.Linear(8, 40), "norm": nn.LayerNorm(8)}
    )
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, ratios=AutoRule()), lr=1e-2)
    auto = AutoRatios(optimizer, cosine_schedule(optimizer, warmup_steps=2, total_steps=20), rule(gain=5.0))
    before = auto.ratios
    for step in range(6):
        ids = torch.randint(40, (16,), generator=torch.Generator().manual_seed(step))
        logits = model["lm_head"](model["norm"](model["embed_tokens"](ids)))
        nn.functional.cross_entropy(logits, (ids * 7 + 1) % 40).backward()
        optimizer.step()
        optimizer.zero_grad()
        auto._schedule.step()
    largest = Block.HEAD  # 8 x 40 and its bias; the embedding has 40 x 8
    assert auto.ratios[largest] == pytest.approx(before[largest], rel=1e-12)
    for block in (Block.EMB, Block.NORM):
        assert auto.ratios[block] != pytest.approx(before[block], rel=1e-3)


def test_the_guard_wants_the_losses_of_the_whole_run_but_its_first_steps():
    training = Training(rule(start=0.1, measurements=20))
    assert [step for step in range(STEPS) if training.auto.guards(step)] == list(range(4, STEPS, 2))


def test_a_block_without_gradient_keeps_its_ratio():
    training = Training(rule(gain=100.0))
    for name, parameter in training.model.named_parameters():
        if classify(training.model)[name] is Block.QK:
            parameter.register_hook(torch.zeros_like)
    training.run(12)
    assert training.auto.ratios[Block.QK] == 1.0
    assert training.auto.ratios[Block.VO] != 1.0


def test_bounds_hold():
    ratios = Training(rule(gain=1e5, low=0.5, high=2.0)).run(12).auto.ratios
    assert all(0.5 - 1e-9 <= ratio <= 2.0 + 1e-9 for ratio in ratios.values())
    assert min(ratios.values()) == pytest.approx(0.5) or max(ratios.values()) == pytest.approx(2.0)


def test_a_loss_that_rises_for_long_brings_ratios_above_1_halfway_back_and_says_so(caplog):
    training = Training(rule(gain=20.0)).run(10)
    before = training.auto.ratios
    assert not any(training.auto.watch(loss) for loss in (3.0, 2.5, 6.0, 2.4))  # one bad batch
    assert training.auto.ratios == before
    backed_off = [training.auto.watch(6.0) for _ in range(3)]
    assert backed_off.count(True) == 1
    for block, ratio in training.auto.ratios.items():
        assert ratio == pytest.approx(min(before[block], math.sqrt(before[block])))
    assert min(before.values()) < 1 < max(before.values())
    assert "the training loss has risen by more than 0.5: ratios backed off to norm" in caplog.text
    restored = Training(rule(gain=20.0))
    restored.optimizer.load_state_dict(training.optimizer.state_dict())
    assert restored.auto.watch(2.0) == training.auto.watch(2.0)
    assert restored.optimizer.param_groups[0]["auto_loss"] == training.optimizer.param_groups[0]["auto_loss"]


def test_accelerates_optimizer_and_schedule_are_unwrapped():
    plain, wrapped = Training(), Training()
    accelerator = Accelerator(cpu=True)
    optimizer, schedule = accelerator.prepare(wrapped.optimizer, wrapped.schedule)
    wrapped.auto = AutoRatios(optimizer, schedule)
    for training in (plain, wrapped):
        training.run(5)
    assert wrapped.auto.ratios == plain.auto.ratios != Training().auto.ratios


def test_a_schedule_of_torch_is_refused():
    optimizer = Training().optimizer
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    with pytest.raises(
        ValueError, match=r"and this is a CosineAnnealingLR: make it with cosine_schedule\(opt"
    ):
        AutoRatios(optimizer, schedule)


def test_what_cannot_be_measured_is_refused():
    model = Training().model
    groups = param_groups(model, lr=1e-2, ratios={})
    sgd = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(ValueError, match="from the state of Adam, AdamW or AdamMini, and this is SGD"):
        AutoRatios(sgd, cosine_schedule(sgd, warmup_steps=1, total_steps=9))

    class Own(torch.optim.AdamW):
        """May step otherwise than its parent."""

    own = Own(groups)
    with pytest.raises(ValueError, match="from the state of Adam, AdamW or AdamMini, and this is Own"):
        AutoRatios(own, cosine_schedule(own, warmup_steps=1, total_steps=9))
    plain = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"has no block: make them with param_groups\(model, lr\)"):
        AutoRatios(plain, cosine_schedule(plain, warmup_steps=1, total_steps=9))
    lonely = torch.optim.AdamW(param_groups(nn.LayerNorm(4), lr=1e-2))
    with pytest.raises(ValueError, match="auto compares blocks, and the optimizer has only norm"):
        AutoRatios(lonely, cosine_schedule(lonely, warmup_steps=1, total_steps=9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("auto:gian=3", "auto: no option 'gian'; there are begin, gain, signal, start, stop"),
        ("auto:gain=much", "auto: gain is 'much'; expected a number"),
        ("auto:gain=-1", r"auto: gain is -1\.0; expected a finite number above 0"),
        ("auto:start=0.5,stop=0.2", r"auto: start is 0\.5 and stop 0\.2; expected 0 <= start < stop <= 1"),
        ("auto:anchor=vo", "auto: anchor is 'vo'; expected ffn or mean"),
        ("auto:begin=paper", "auto: begin is 'paper'; expected measured or uniform"),
        ("auto:signal=sign", "auto: signal is 'sign'; expected consistency or cosine"),
        ("auto:measurements=0", "auto: measurements is 0; expected 1 or more"),
        ("auto:re_measure=-1", "auto: re_measure is -1; expected 0 or more"),
        ("auto:guard=0", "auto: guard is 0; expected a number of nats above 0"),
        ("auto:low=2", "auto: low is 2 and high 100; expected 0 < low < 1 < high"),
    ],
)
def test_options_out_of_range_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_auto(text)


def test_options_are_read():
    assert parse_auto("auto") == AutoRule()
    assert parse_auto("auto:gain=5,anchor=mean,measurements=7") == AutoRule(
        gain=5.0, anchor="mean", measurements=7
    )
    assert parse_auto("paper") is None


# The hook and its owner
# ---------------------------------------------------------------------------------------------------------------


def hooks(optimizer) -> list[object]:
    return list(optimizer._optimizer_step_pre_hooks.values())


def test_closing_removes_the_hook_and_leaves_the_ratios():
    training = Training(rule(gain=40.0, stop=1.0)).run(9)
    training.auto.close()
    training.auto.close()
    assert training.auto.closed
    assert hooks(training.optimizer) == []
    before = training.auto.ratios
    assert training.run(5).auto.ratios == before
    assert not training.auto.due(9)
    assert not training.auto.guards(9)
    with pytest.raises(
        RuntimeError, match=r"this AutoRatios is closed.* make another one, AutoRatios\(optimizer"
    ):
        training.auto.watch(3.0)


def test_the_end_of_a_block_closes_it_by_an_error_too():
    training = Training(rule(gain=40.0, stop=1.0))
    training.auto.close()
    with suppress(KeyboardInterrupt), AutoRatios(training.optimizer, training.schedule) as auto:
        assert len(hooks(training.optimizer)) == 1
        raise KeyboardInterrupt
    assert auto.closed
    assert hooks(training.optimizer) == []


def test_a_second_one_on_the_same_optimizer_takes_over():
    """The old schedule stands still, so that the old object would move the ratios at every step, for good."""
    training = Training(rule(gain=40.0, stop=0.5)).run(5)
    old = training.auto
    training.schedule = cosine_schedule(training.optimizer, warmup_steps=4, total_steps=STEPS, floor=1e-3)
    training.auto = AutoRatios(training.optimizer, training.schedule, rule(gain=40.0, stop=0.5))
    assert old.closed
    assert len(hooks(training.optimizer)) == 1
    training.run(20)
    at_rest = training.auto.ratios
    assert training.run(5).auto.ratios == at_rest
    old.close()  # not the newer one's hook
    assert len(hooks(training.optimizer)) == 1


def test_one_that_is_refused_leaves_the_earlier_one_in_place():
    training = Training(rule())
    training.optimizer.param_groups[0].pop("block")
    with pytest.raises(ValueError, match="has no block"):
        AutoRatios(training.optimizer, training.schedule, rule())
    assert not training.auto.closed


class EqualSlopes(Training):
    """Uniform ratios that grow fast, while a warm-up at an equal slope bounds how far they may."""

    def __init__(self, make, steps: int = STEPS, **options) -> None:
        super().__init__(rule(**{"gain": 200.0, "stop": 1.0, **options}))
        self.schedule = make(
            self.optimizer, warmup_steps=2, total_steps=steps, floor=1e-3, warmup="equal_slope"
        )
        self.auto = AutoRatios(self.optimizer, self.schedule, self.auto.rule)


@pytest.mark.parametrize(("make", "longest"), [(cosine_schedule, STEPS / 2), (wsd_schedule, STEPS / 6)])
@pytest.mark.parametrize("options", [{}, {"stop": 0.2, "re_measure": 1}, {"guard": 1e-3}], ids=str)
def test_no_ratio_grows_beyond_what_its_warm_up_at_an_equal_slope_leaves_room_for(
    make, longest, options, caplog
):
    training = EqualSlopes(make, **options)
    highest = 0.0
    for step in range(STEPS):
        training.run(1)
        if "guard" in options and step % 5 == 4:
            training.auto.watch(5.0 + step)
        highest = max(highest, *training.auto.ratios.values())
        for group in training.optimizer.param_groups:
            assert math.isfinite(group["lr"])
    assert highest <= longest
    if "guard" not in options:
        assert highest == pytest.approx(longest)
        said = [r.getMessage() for r in caplog.records if "no ratio goes above" in r.getMessage()]
        assert len(said) == 1
        assert f"no ratio goes above {longest:.3g}, since its warm-up at an equal slope" in said[0]
    assert training.schedule.last_epoch == STEPS


@pytest.mark.parametrize("make", [cosine_schedule, wsd_schedule])
def test_a_bounded_run_is_resumed_and_a_shorter_one_is_refused_when_it_is_loaded(make):
    training = EqualSlopes(make).run(20)
    states = copy.deepcopy([each.state_dict() for each in (training.optimizer, training.schedule)])
    resumed = EqualSlopes(make)
    resumed.model.load_state_dict(training.model.state_dict())
    resumed.optimizer.load_state_dict(states[0])
    resumed.schedule.load_state_dict(states[1])
    assert resumed.run(20).auto.ratios == training.run(20).auto.ratios
    for group in states[0]["param_groups"]:
        group["lr_ratio"], group["initial_lr"] = 6.0, 6e-2  # a warm-up of 12 steps
    shorter = EqualSlopes(make, steps=12)
    with pytest.raises(ValueError, match=r"warm-up takes 12 steps, but .*total_steps=12"):
        shorter.optimizer.load_state_dict(states[0])


def test_a_warm_up_that_all_share_bounds_no_ratio():
    training = Training(rule(gain=200.0, stop=1.0)).run(STEPS)
    assert training.schedule.largest_ratio == math.inf
    assert max(training.auto.ratios.values()) > STEPS / 4
