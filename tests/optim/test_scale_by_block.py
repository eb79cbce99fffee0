"""Every torch schedule, scaled: each block is at its ratio of what the schedule gives one group at the base rate."""

import copy
import math
import pickle

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedules
from torch.optim.swa_utils import SWALR

from blockwise_lr import AdamMini, Muon, cosine_schedule, param_groups, scale_by_block, set_lr
from support.nano import TitanLlama

BASE, TOTAL = 1e-3, 24
LOSSES = [3.0, 2.0, 2.5, 2.6, 2.7, 1.9, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5]


def sequential(optimizer):
    return torch_schedules.SequentialLR(
        optimizer,
        [
            torch_schedules.LinearLR(optimizer, 0.1, total_iters=5),
            torch_schedules.CosineAnnealingLR(optimizer, 12, eta_min=1e-4),
            torch_schedules.ConstantLR(optimizer, 0.1, total_iters=3),
        ],
        [5, 17],
    )


def chained(optimizer):
    return torch_schedules.ChainedScheduler(
        [
            torch_schedules.LinearLR(optimizer, 0.1, total_iters=5),
            torch_schedules.CosineAnnealingLR(optimizer, 12, eta_min=1e-4),
            torch_schedules.ExponentialLR(optimizer, 0.95),
        ]
    )


def nested(optimizer):
    return torch_schedules.ChainedScheduler(
        [sequential(optimizer), torch_schedules.ExponentialLR(optimizer, 0.95)]
    )


def then_one_cycle(optimizer):
    one_cycle = torch_schedules.OneCycleLR(optimizer, BASE, total_steps=20)
    warmup = torch_schedules.LinearLR(optimizer, 0.1, total_iters=4)
    return torch_schedules.SequentialLR(optimizer, [warmup, one_cycle], [4])


def of_transformers(name, **settings):
    from transformers import get_scheduler

    return lambda optimizer: get_scheduler(name, optimizer, 3, TOTAL, settings)


def greedy(optimizer):
    from transformers.optimization import GreedyLR

    return GreedyLR(optimizer, patience=1, factor=0.5, min_lr=1e-4, max_lr=2e-3, reset_start=2)


SCHEDULES = {
    "LambdaLR": lambda o: torch_schedules.LambdaLR(o, lambda t: min(1.0, t / 5)),
    "MultiplicativeLR": lambda o: torch_schedules.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: torch_schedules.StepLR(o, 5, 0.3),
    "MultiStepLR": lambda o: torch_schedules.MultiStepLR(o, [4, 9], 0.3),
    "ConstantLR": lambda o: torch_schedules.ConstantLR(o, 0.3, 6),
    "LinearLR": lambda o: torch_schedules.LinearLR(o, 0.01, 1.0, 8),
    "ExponentialLR": lambda o: torch_schedules.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: torch_schedules.PolynomialLR(o, 12, 2.0),
    "CosineAnnealingLR": lambda o: torch_schedules.CosineAnnealingLR(o, 12, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: torch_schedules.CosineAnnealingWarmRestarts(o, 4, 2, 1e-4),
    "OneCycleLR": lambda o: torch_schedules.OneCycleLR(o, BASE, total_steps=TOTAL),
    "OneCycleLR three phases": lambda o: torch_schedules.OneCycleLR(
        o, BASE, total_steps=TOTAL, three_phase=True, anneal_strategy="linear"
    ),
    "CyclicLR": lambda o: torch_schedules.CyclicLR(o, 1e-4, BASE, 5),
    "CyclicLR triangular2": lambda o: torch_schedules.CyclicLR(o, 1e-4, BASE, 3, mode="triangular2"),
    "ReduceLROnPlateau": lambda o: torch_schedules.ReduceLROnPlateau(o, patience=0, factor=0.3, min_lr=5e-5),
    "GreedyLR": greedy,
    "SWALR": lambda o: SWALR(o, 5e-5, 8),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "ChainedScheduler of SequentialLR": nested,
    "SequentialLR with OneCycleLR": then_one_cycle,
    "cosine of transformers": of_transformers("cosine"),
    "polynomial of transformers": of_transformers("polynomial", lr_end=1e-5),
    "cosine_with_min_lr of transformers": of_transformers("cosine_with_min_lr", min_lr=1e-4),
    "warmup_stable_decay of transformers": of_transformers("warmup_stable_decay", num_decay_steps=6),
}  # fmt: skip
ALL = pytest.mark.parametrize("name", SCHEDULES)
PAPER = {"norm": 1, "vo": 4, "ffn": 6, "qk": 8, "emb": 10}
SLOW = {"norm": 32, "vo": 0.5, "ffn": 2, "qk": 4, "emb": 16, "head": 16}  # no block at the base rate
ONE = dict.fromkeys(["norm", "vo", "ffn", "qk", "emb", "head"], 4)  # all equal, and not 1


def optimizer_by_block(ratios=PAPER, kind=torch.optim.AdamW, **settings):
    torch.manual_seed(0)
    return kind(param_groups(TitanLlama(), BASE, ratios, **settings), lr=BASE)


def alone():
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=BASE)


def advance(scheduler, step):
    scheduler.optimizer.step()
    by_loss = isinstance(scheduler, torch_schedules.ReduceLROnPlateau) or "Greedy" in type(scheduler).__name__
    if by_loss:
        scheduler.step(LOSSES[step % len(LOSSES)])
    else:
        scheduler.step()


def rates(scheduler):
    return [float(group["lr"]) for group in scheduler.optimizer.param_groups]


def momenta(scheduler):
    return [group["betas"] for group in scheduler.optimizer.param_groups]


@ALL
@pytest.mark.parametrize("ratios", [PAPER, SLOW, ONE, {}], ids=["paper", "slow", "one", "uniform"])
def test_each_block_is_at_its_ratio_of_the_schedule_of_a_single_group(name, ratios):
    reference = SCHEDULES[name](alone())
    scheduler = scale_by_block(SCHEDULES[name](optimizer_by_block(ratios)))
    seen = set()
    for step in range(TOTAL):
        (expected,) = rates(reference)
        seen.add(expected)
        ratio = [group["lr_ratio"] for group in scheduler.optimizer.param_groups]
        assert rates(scheduler) == pytest.approx([r * expected for r in ratio], rel=1e-9, abs=1e-15)
        assert scheduler.get_last_lr() == rates(scheduler)
        assert momenta(scheduler) == [momenta(reference)[0]] * len(ratio)
        if step < TOTAL - 1:
            advance(reference, step)
            advance(scheduler, step)
    assert len(seen) > 1


def falling(t, start, end, steps):
    return end + (start - end) * (1 + math.cos(math.pi * t / steps)) / 2


CLOSED_FORMS = {
    "LambdaLR": lambda t: BASE * min(1.0, t / 5),
    "ExponentialLR": lambda t: BASE * 0.9**t,
    "MultiplicativeLR": lambda t: BASE * 0.9**t,
    "StepLR": lambda t: BASE * 0.3 ** (t // 5),
    "LinearLR": lambda t: BASE * (0.01 + 0.99 * min(t, 8) / 8),
    "PolynomialLR": lambda t: BASE * (1 - min(t, 12) / 12) ** 2,
    "CosineAnnealingLR": lambda t: falling(t, BASE, 1e-4, 12),
    "CosineAnnealingWarmRestarts": lambda t: falling(
        *((t, BASE, 1e-4, 4) if t < 4 else (t - 4, BASE, 1e-4, 8) if t < 12 else (t - 12, BASE, 1e-4, 16))
    ),
    "OneCycleLR": lambda t: (
        falling(t, BASE / 25, BASE, 6.2) if t <= 6.2 else falling(t - 6.2, BASE, BASE / 25e4, TOTAL - 7.2)
    ),
    "CyclicLR": lambda t: 1e-4 + (BASE - 1e-4) * (1 - abs(t % 10 - 5) / 5),
    "SequentialLR": lambda t: (
        BASE * (0.1 + 0.9 * t / 5)
        if t < 5
        else falling(t - 5, BASE, 1e-4, 12)
        if t < 17
        else BASE * (0.1 if t < 20 else 1)
    ),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_each_block_is_at_its_ratio_of_the_closed_form(name):
    scheduler = scale_by_block(SCHEDULES[name](optimizer_by_block(SLOW)))
    for step in range(TOTAL - 1):
        ratio = [group["lr_ratio"] for group in scheduler.optimizer.param_groups]
        expected = CLOSED_FORMS[name](step)
        assert rates(scheduler) == pytest.approx([r * expected for r in ratio], rel=1e-9, abs=1e-12)
        advance(scheduler, step)


@ALL
def test_with_every_ratio_one_it_is_the_plain_schedule_to_the_bit(name):
    plain = SCHEDULES[name](optimizer_by_block({}))
    scheduler = scale_by_block(SCHEDULES[name](optimizer_by_block({})))
    for step in range(TOTAL - 1):
        if step or not name.startswith("CyclicLR"):  # whose first rate in torch is the groups' initial_lr
            assert rates(scheduler) == rates(plain)
        advance(plain, step)
        advance(scheduler, step)


@ALL
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_a_run_that_is_resumed_in_the_middle_goes_on_to_the_bit(name, optimizer_first, tmp_path):
    whole = scale_by_block(SCHEDULES[name](optimizer_by_block()))
    for step in range(9):
        advance(whole, step)
    torch.save((whole.optimizer.state_dict(), whole.state_dict()), tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    kept = copy.deepcopy(states)
    optimizer = optimizer_by_block()
    if optimizer_first:
        optimizer.load_state_dict(states[0])
    resumed = scale_by_block(SCHEDULES[name](optimizer))
    resumed.load_state_dict(states[1])
    if not optimizer_first:
        optimizer.load_state_dict(states[0])
    assert states[1].keys() == kept[1].keys()  # what was loaded is left as it was
    for step in range(9, TOTAL - 1):
        assert rates(resumed) == rates(whole)
        assert resumed.get_last_lr() == whole.get_last_lr()
        assert momenta(resumed) == momenta(whole)
        advance(whole, step)
        advance(resumed, step)


def test_a_saved_state_does_not_move_on_with_the_schedule():
    scheduler = scale_by_block(SCHEDULES["CosineAnnealingLR"](optimizer_by_block()))
    saved = scheduler.state_dict()
    kept = copy.deepcopy(saved)
    advance(scheduler, 0)
    assert saved == kept


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "OneCycleLR", "LinearLR", "SequentialLR"])
def test_rates_that_are_tensors_are_changed_in_place(name):
    def with_tensors(optimizer):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
        return optimizer

    optimizer = with_tensors(optimizer_by_block())
    held = [group["lr"] for group in optimizer.param_groups]
    reference = SCHEDULES[name](with_tensors(alone()))
    scheduler = scale_by_block(SCHEDULES[name](optimizer))
    for step in range(TOTAL - 1):
        expected = [group["lr_ratio"] * rates(reference)[0] for group in optimizer.param_groups]
        assert rates(scheduler) == pytest.approx(expected)
        advance(reference, step)
        advance(scheduler, step)
    assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, held))


def test_a_list_with_the_rate_of_each_group_means_the_same():
    optimizer = optimizer_by_block()
    peaks = [group["lr"] for group in optimizer.param_groups]
    listed = scale_by_block(torch_schedules.OneCycleLR(optimizer, peaks, total_steps=TOTAL))
    single = scale_by_block(SCHEDULES["OneCycleLR"](optimizer_by_block()))
    for step in range(TOTAL - 1):
        assert rates(listed) == pytest.approx(rates(single))
        advance(listed, step)
        advance(single, step)


def test_two_schedules_on_one_optimizer_go_on_from_each_other():
    def both(optimizer, wrap):
        warmup = wrap(torch_schedules.LinearLR(optimizer, 0.1, total_iters=5))
        plateau = wrap(torch_schedules.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, min_lr=1e-4))
        return warmup, plateau

    reference, scaled = both(alone(), lambda s: s), both(optimizer_by_block(), scale_by_block)
    for step in range(12):
        for warmup, plateau in (reference, scaled):
            advance(warmup, step)
            if step % 3 == 2:
                plateau.step(LOSSES[step])
        ratio = [group["lr_ratio"] for group in scaled[0].optimizer.param_groups]
        assert rates(scaled[0]) == pytest.approx([r * rates(reference[0])[0] for r in ratio])


def test_parts_that_were_wrapped_one_by_one_may_be_put_in_a_sequence():
    def parts(optimizer, wrap):
        return torch_schedules.SequentialLR(
            optimizer,
            [
                wrap(torch_schedules.LinearLR(optimizer, 0.1, total_iters=5)),
                wrap(torch_schedules.CosineAnnealingLR(optimizer, 12, eta_min=1e-4)),
            ],
            [5],
        )

    reference, scaled = parts(alone(), lambda s: s), parts(optimizer_by_block(), scale_by_block)
    for step in range(15):
        ratio = [group["lr_ratio"] for group in scaled.optimizer.param_groups]
        assert rates(scaled) == pytest.approx([r * rates(reference)[0] for r in ratio])
        advance(reference, step)
        advance(scaled, step)
    with pytest.raises(ValueError, match=r"wrap only the outermost, scale_by_block\(SequentialLR"):
        scale_by_block(scaled)


def test_ratios_that_move_are_followed_at_the_next_step():
    reference = SCHEDULES["CosineAnnealingLR"](alone())
    scheduler = scale_by_block(SCHEDULES["CosineAnnealingLR"](optimizer_by_block()))
    for step in range(10):
        scheduler.optimizer.param_groups[-1]["lr_ratio"] = 2.0 + step
        advance(reference, step)
        advance(scheduler, step)
        assert rates(scheduler)[-1] == pytest.approx((2.0 + step) * rates(reference)[0])


@pytest.mark.parametrize("name", ["LambdaLR", "OneCycleLR", "CosineAnnealingLR"])
def test_constant_decay_shrinks_every_block_as_the_base_rate_would(name):
    scheduler = scale_by_block(SCHEDULES[name](optimizer_by_block(decay="constant")))
    for step in range(TOTAL - 1):
        groups = scheduler.optimizer.param_groups
        shrinks = [group["lr"] * group["weight_decay"] for group in groups]
        assert shrinks == pytest.approx([groups[0]["lr"] * 0.1] * len(groups))
        advance(scheduler, step)


@pytest.mark.parametrize("kind", [AdamMini, Muon, torch.optim.SGD])
def test_it_works_on_other_optimizers(kind):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    optimizer = kind(param_groups(LlamaForCausalLM(config), BASE), lr=BASE)
    scheduler = scale_by_block(
        torch_schedules.OneCycleLR(optimizer, BASE, total_steps=TOTAL, cycle_momentum=False)
    )
    for _ in range(8):
        optimizer.step()
        scheduler.step()
    lrs = [group["lr"] / group["lr_ratio"] for group in optimizer.param_groups]
    assert lrs == pytest.approx([lrs[0]] * len(lrs))


def test_it_stays_what_it_was_for_loops_that_ask_for_the_class():
    plateau = scale_by_block(SCHEDULES["ReduceLROnPlateau"](optimizer_by_block()))
    assert isinstance(
        plateau, torch_schedules.ReduceLROnPlateau
    )  # Lightning and Trainer then give it the loss
    assert scale_by_block(plateau) is plateau


def test_accelerates_wrapper_steps_it_and_may_also_be_given():
    accelerate = pytest.importorskip("accelerate")
    for prepare_first in (False, True):
        optimizer = optimizer_by_block()
        scheduler = SCHEDULES["OneCycleLR"](optimizer)
        if not prepare_first:
            scheduler = scale_by_block(scheduler)
        optimizer, scheduler = accelerate.Accelerator(cpu=True).prepare(optimizer, scheduler)
        if prepare_first:
            scheduler = scale_by_block(scheduler)
        reference = SCHEDULES["OneCycleLR"](alone())
        for step in range(TOTAL - 1):
            expected = [group["lr_ratio"] * rates(reference)[0] for group in optimizer.param_groups]
            assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
            assert scheduler.get_last_lr() == pytest.approx(expected)
            advance(reference, step)
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_it_can_be_copied_and_pickled(copied):
    scheduler = scale_by_block(SCHEDULES["OneCycleLR"](optimizer_by_block()))
    advance(scheduler, 0)
    other = copied(scheduler)
    for step in range(1, 8):
        advance(scheduler, step)
        advance(other, step)
        assert rates(other) == rates(scheduler)


def test_set_lr_between_two_steps_is_where_a_chainable_schedule_goes_on_from():
    scheduler = scale_by_block(torch_schedules.ExponentialLR(optimizer_by_block(), 0.9))
    advance(scheduler, 0)
    set_lr(scheduler.optimizer, 5e-4)
    advance(scheduler, 1)
    groups = scheduler.optimizer.param_groups
    assert rates(scheduler) == pytest.approx([4.5e-4 * group["lr_ratio"] for group in groups])


def test_a_last_step_too_many_leaves_the_rates_as_they_were():
    scheduler = scale_by_block(torch_schedules.OneCycleLR(optimizer_by_block(), BASE, total_steps=3))
    for step in range(3):
        advance(scheduler, step)
    before = rates(scheduler)
    with pytest.raises(ValueError, match="Tried to step"):
        scheduler.step()
    assert rates(scheduler) == before


def test_a_schedule_of_this_library_needs_no_wrapper_and_says_so():
    schedule = cosine_schedule(optimizer_by_block(), warmup_steps=2, total_steps=10)
    with pytest.raises(ValueError, match="BlockwiseSchedule gives each block its own learning rate already"):
        scale_by_block(schedule)


def test_a_schedule_that_has_moved_the_blocks_apart_is_refused_with_what_to_do():
    optimizer = optimizer_by_block()
    scheduler = SCHEDULES["CosineAnnealingLR"](optimizer)
    for step in range(6):
        advance(scheduler, step)
    with pytest.raises(ValueError, match=r"moved the blocks apart already .*: wrap it when it is made"):
        scale_by_block(scheduler)


def test_the_state_of_a_schedule_without_wrapper_is_refused_with_what_to_do():
    bare = SCHEDULES["OneCycleLR"](optimizer_by_block())
    for step in range(5):
        advance(bare, step)
    scheduler = scale_by_block(SCHEDULES["OneCycleLR"](optimizer_by_block()))
    with pytest.raises(
        ValueError, match=r"saved by a OneCycleLR without scale_by_block.*before it is wrapped"
    ):
        scheduler.load_state_dict(bare.state_dict())
    # What the message says:
    late = SCHEDULES["OneCycleLR"](optimizer_by_block())
    late.load_state_dict(bare.state_dict())
    late = scale_by_block(late)
    reference = SCHEDULES["OneCycleLR"](alone())
    for step in range(6):
        advance(reference, step)
    advance(late, 5)
    ratio = [group["lr_ratio"] for group in late.optimizer.param_groups]
    assert rates(late) == pytest.approx([r * rates(reference)[0] for r in ratio])


@pytest.mark.parametrize("bad", [None, torch.nn.Linear(1, 1), {"scheduler": 1}])
def test_what_is_no_schedule_is_refused_by_its_kind(bad):
    with pytest.raises(ValueError, match=r"scale_by_block got a \w+; expected a torch schedule, such as"):
        scale_by_block(bad)
