import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockwise_lr import cosine_schedule, wsd_schedule
from blockwise_lr.optim import block_lr, cosine, wsd

RATIOS = {"norm": 1.0, "vo": 0.25, "ffn": 6.0, "emb": 10.0}
BASE, FLOOR, WARMUP, TOTAL = 1e-3, 5e-5, 6, 60


def optimizer_by_block(decay="coupled", weight_decay=0.1):
    groups = [
        {
            "params": [torch.nn.Parameter(torch.ones(2))],
            "lr": ratio * BASE,
            "initial_lr": ratio * BASE,
            "lr_ratio": ratio,
            "block": block,
            "decay": decay,
            "weight_decay": weight_decay / (ratio if decay == "constant" else 1),
        }
        for block, ratio in RATIOS.items()
    ]
    return torch.optim.AdamW(groups, lr=BASE)


def literal_cosine(t, ratio, floor=None, warmup=WARMUP):
    """lr_b(t) = floor + c(t) * (r_b * eta_base - floor), as the paper writes it; the warm-up begins above 0."""
    floor = min(FLOOR, ratio * BASE) if floor is None else floor
    if t < warmup:
        return ratio * BASE * (t + 1) / warmup
    c = 0.5 * (1 + math.cos(math.pi * (t - warmup) / (TOTAL - warmup)))
    return floor + c * (ratio * BASE - floor)


def steps(scheduler):
    """(step, learning rates) at every step of the run."""
    for step in range(TOTAL + 1):
        yield step, scheduler.get_last_lr()
        scheduler.optimizer.step()
        scheduler.step()


def test_the_documented_value():
    assert cosine(1000, peak=6e-3, warmup_steps=1000, total_steps=50_000, floor=3e-5) == 6e-3


def test_get_last_lr_is_the_closed_form_at_every_step():
    scheduler = cosine_schedule(optimizer_by_block(), warmup_steps=WARMUP, total_steps=TOTAL, floor=FLOOR)
    for step, lrs in steps(scheduler):
        assert lrs == pytest.approx([literal_cosine(step, r) for r in RATIOS.values()], rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("make", [cosine_schedule, wsd_schedule])
def test_the_first_update_has_the_peak_over_the_warm_up_and_the_last_of_the_warm_up_the_peak(make):
    scheduler = make(optimizer_by_block(), warmup_steps=WARMUP, total_steps=TOTAL)
    seen = [lrs for _, lrs in steps(scheduler)]
    for ratio, first, last in zip(RATIOS.values(), seen[0], seen[WARMUP - 1]):
        assert first == pytest.approx(ratio * BASE / WARMUP)
        assert last == ratio * BASE


@pytest.mark.parametrize("make", [cosine_schedule, wsd_schedule])
def test_the_authors_warm_up_from_zero_stays_available(make):
    scheduler = make(optimizer_by_block(), warmup_steps=WARMUP, total_steps=TOTAL, warmup_start="zero")
    seen = [lrs for _, lrs in steps(scheduler)]
    assert seen[0] == [0.0] * 4
    for step in range(WARMUP + 1):
        assert seen[step] == pytest.approx([r * BASE * step / WARMUP for r in RATIOS.values()])
    default = make(optimizer_by_block(), warmup_steps=WARMUP, total_steps=TOTAL)
    assert seen[WARMUP:] == [lrs for _, lrs in steps(default)][WARMUP:]


@pytest.mark.parametrize("make", [cosine_schedule, wsd_schedule])
def test_without_a_warm_up_the_first_update_has_the_peak_either_way(make):
    for start in ("above_zero", "zero"):
        scheduler = make(optimizer_by_block(), warmup_steps=0, total_steps=TOTAL, warmup_start=start)
        assert scheduler.get_last_lr() == [r * BASE for r in RATIOS.values()]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_a_compiled_optimizer_step_stays_finite_under_the_default_warm_up(backend, as_tensor):
    groups = optimizer_by_block().param_groups
    for group in groups:
        group["lr"] = torch.tensor(group["lr"]) if as_tensor else group["lr"]
    optimizer = torch.optim.AdamW(groups, lr=BASE)
    scheduler = cosine_schedule(optimizer, warmup_steps=3, total_steps=TOTAL, floor=FLOOR)
    update = torch.compile(optimizer.step, backend=backend)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(3):
        before = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.full_like(p, step + 1.0)
        update()
        scheduler.step()
        assert all(p.isfinite().all() and (p != was).all() for p, was in zip(parameters, before))


@given(ratio=st.floats(0.01, 20.0), warmup=st.integers(1, 20), step=st.integers(0, 100))
def test_a_warm_up_of_any_length_rises_from_above_zero_to_the_peak_and_never_above(ratio, warmup, step):
    def lr(t):
        how = {"warmup_steps": warmup, "total_steps": 2000, "floor": 0.0, "warmup": "equal_slope"}
        return block_lr(t, peak=ratio, ratio=ratio, shape="wsd", **how)

    assert 0 < lr(step) <= ratio
    assert lr(step) <= lr(step + 1)
    assert lr(math.ceil(ratio * warmup) - 1) == ratio


def test_blocks_above_the_floor_end_at_one_shared_floor_and_a_slower_one_at_its_own_peak():
    optimizer = optimizer_by_block()
    scheduler = cosine_schedule(optimizer, warmup_steps=WARMUP, total_steps=TOTAL, floor=4e-4)
    *_, (_, last) = steps(scheduler)
    assert last == pytest.approx([4e-4, 0.25 * BASE, 4e-4, 4e-4])


def test_a_proportional_floor_keeps_the_ratios_to_the_end():
    scheduler = cosine_schedule(
        optimizer_by_block(), warmup_steps=WARMUP, total_steps=TOTAL, floor=FLOOR, floor_mode="proportional"
    )
    for _, lrs in list(steps(scheduler))[1:]:
        assert [lr / lrs[0] for lr in lrs] == pytest.approx(list(RATIOS.values()))


def test_equal_slopes_warm_up_over_ratio_times_as_many_steps():
    optimizer = optimizer_by_block()
    scheduler = cosine_schedule(
        optimizer, warmup_steps=4, total_steps=TOTAL, floor=FLOOR, warmup="equal_slope"
    )
    slope = BASE / 4
    for step, lrs in steps(scheduler):
        for ratio, lr in zip(RATIOS.values(), lrs):
            if step <= 4 * ratio:
                assert lr == pytest.approx(min(slope * (step + 1), ratio * BASE))


def test_wsd_has_the_papers_three_phases():
    def lr(t, peak):
        return wsd(t, peak=peak, base=1.0, warmup_steps=10, total_steps=300, floor=0.1)

    assert [lr(t, 8.0) for t in (0, 4, 10, 100)] == [0.8, 4.0, 8.0, 8.0]
    assert lr(150, 8.0) == pytest.approx(4.5)  # half-way from 8 to the base
    # From two thirds on all blocks go together, from the base to the floor.
    for t in (200, 230, 290, 300, 310):
        assert lr(t, 8.0) == pytest.approx(lr(t, 1.0))
    assert lr(300, 8.0) == pytest.approx(0.1)
    # A slow block has nowhere to come down from.
    assert [lr(t, 0.5) for t in (100, 150, 200)] == [0.5, 0.5, 0.5]


def test_the_wsd_scheduler_follows_the_function():
    optimizer = optimizer_by_block()
    scheduler = wsd_schedule(optimizer, warmup_steps=WARMUP, total_steps=TOTAL, floor=FLOOR)
    for step, lrs in steps(scheduler):
        expected = [
            wsd(step, peak=r * BASE, base=BASE, warmup_steps=WARMUP, total_steps=TOTAL, floor=FLOOR)
            for r in RATIOS.values()
        ]
        assert lrs == expected


@given(
    peak=st.floats(1e-6, 1.0),
    share=st.floats(0.0, 1.0),
    warmup=st.integers(0, 99),
    step=st.integers(0, 150),
)
def test_cosine_stays_between_zero_and_the_peak_and_falls_after_the_warm_up(peak, share, warmup, step):
    def lr(t):
        return cosine(t, peak=peak, warmup_steps=warmup, total_steps=100, floor=share * peak)

    assert 0 <= lr(step) <= peak * (1 + 1e-12)
    if step >= warmup:
        assert lr(step + 1) <= lr(step) * (1 + 1e-12)
        assert lr(step) >= share * peak * (1 - 1e-12)


def test_a_schedule_goes_on_from_its_state_dict():
    optimizer = optimizer_by_block()
    scheduler = cosine_schedule(optimizer, warmup_steps=WARMUP, total_steps=TOTAL, floor=FLOOR)
    for _ in range(25):
        optimizer.step()
        scheduler.step()
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))

    resumed_optimizer = optimizer_by_block()
    resumed = cosine_schedule(resumed_optimizer, warmup_steps=WARMUP, total_steps=TOTAL, floor=FLOOR)
    resumed_optimizer.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for _ in range(30):
        assert resumed.get_last_lr() == scheduler.get_last_lr()
        for each in (optimizer, resumed_optimizer, scheduler, resumed):
            each.step()
        assert [g["lr"] for g in resumed_optimizer.param_groups] == [g["lr"] for g in optimizer.param_groups]


def test_its_state_loads_with_weights_only(tmp_path):
    optimizer = optimizer_by_block()
    scheduler = cosine_schedule(optimizer, warmup_steps=WARMUP, total_steps=TOTAL)
    torch.save({"o": optimizer.state_dict(), "s": scheduler.state_dict()}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["s"]["total_steps"] == TOTAL
    assert loaded["o"]["param_groups"][0]["block"] == "norm"


@pytest.mark.parametrize("number", [np.int64, np.float32, np.float64])
def test_numpys_numbers_are_saved_as_pythons(number, tmp_path):
    optimizer, plain = optimizer_by_block(), optimizer_by_block()
    scheduler = cosine_schedule(
        optimizer, warmup_steps=number(WARMUP), total_steps=number(TOTAL), floor=np.float64(FLOOR)
    )
    expected = cosine_schedule(plain, warmup_steps=WARMUP, total_steps=TOTAL, floor=FLOOR)
    torch.save({"o": optimizer.state_dict(), "s": scheduler.state_dict()}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["s"] == expected.state_dict()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"floor": None}, "floor is None; expected a number: floor=3e-5"),
        ({"floor": "1e-5"}, "floor is the text '1e-5'; expected a number: without quotes, floor=1e-5"),
        ({"total_steps": "100"}, "total_steps is the text '100'; expected a number"),
        ({"total_steps": None}, "total_steps is None; expected a number: total_steps=1000"),
    ],
)
@pytest.mark.parametrize("make", [cosine_schedule, wsd_schedule])
def test_settings_that_are_no_numbers_are_refused(make, bad, message):
    with pytest.raises(TypeError, match=message):
        make(optimizer_by_block(), **{"warmup_steps": 1, "total_steps": TOTAL, **bad})


def test_groups_in_place_of_the_optimizer_are_refused():
    groups = optimizer_by_block().param_groups
    with pytest.raises(TypeError, match=r"a schedule got a list; expected an optimizer .* wsd_schedule\(opt"):
        wsd_schedule(groups, warmup_steps=1, total_steps=TOTAL)


def test_a_group_added_in_the_middle_joins_the_schedule_with_its_lr_as_peak():
    optimizer = optimizer_by_block()
    scheduler = cosine_schedule(optimizer, warmup_steps=WARMUP, total_steps=TOTAL, floor=FLOOR)
    for _ in range(20):
        optimizer.step()
        scheduler.step()
    optimizer.add_param_group(
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 3 * BASE, "lr_ratio": 3.0}
    )
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr()[-1] == pytest.approx(literal_cosine(21, 3.0))


def test_an_engine_that_overwrote_every_learning_rate_is_put_right_at_the_next_step():
    optimizer = optimizer_by_block()
    scheduler = cosine_schedule(optimizer, warmup_steps=WARMUP, total_steps=TOTAL, floor=FLOOR)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(
        [literal_cosine(1, r) for r in RATIOS.values()]
    )


@pytest.mark.parametrize("make", [cosine_schedule, wsd_schedule])
def test_constant_decay_is_the_base_learning_rates_decay_at_every_step(make):
    optimizer = optimizer_by_block(decay="constant")
    scheduler = make(optimizer, warmup_steps=WARMUP, total_steps=TOTAL, floor=FLOOR)
    for step, _ in steps(scheduler):
        if step > TOTAL - 1:
            break
        effective = [group["lr"] * group["weight_decay"] for group in optimizer.param_groups]
        assert effective == pytest.approx([effective[0]] * len(effective))


@given(st.floats(1e-6, 1.0), st.floats(0.01, 100.0))
def test_a_floor_equal_to_the_base_learning_rate_is_taken_whatever_the_rounding(base, ratio):
    peak = ratio * base
    for shape in ("cosine", "wsd"):
        last = block_lr(90, peak=peak, ratio=ratio, shape=shape, warmup_steps=3, total_steps=90, floor=base)
        assert last == pytest.approx(min(base, peak))


def test_coupled_decay_is_left_alone():
    optimizer = optimizer_by_block()
    scheduler = cosine_schedule(optimizer, warmup_steps=WARMUP, total_steps=TOTAL, floor=FLOOR)
    for _ in steps(scheduler):
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


def test_groups_without_metadata_count_as_ratio_one():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=BASE)
    scheduler = cosine_schedule(optimizer, warmup_steps=WARMUP, total_steps=TOTAL, floor=FLOOR)
    for step, lrs in steps(scheduler):
        assert lrs == pytest.approx([literal_cosine(step, 1.0)])


def test_a_warm_up_as_long_as_the_run_is_refused_with_the_numbers():
    with pytest.raises(
        ValueError, match=r"warm-up takes 60 steps, but the run has total_steps=60: .* train for longer"
    ):
        cosine_schedule(optimizer_by_block(), warmup_steps=60, total_steps=60)


def test_a_slope_that_warms_up_past_the_end_is_refused_when_the_schedule_is_made():
    with pytest.raises(ValueError, match=r"warm-up takes 70 steps, but the run has total_steps=60"):
        cosine_schedule(optimizer_by_block(), warmup_steps=7, total_steps=60, warmup="equal_slope")


def test_wsd_refuses_a_warm_up_past_its_first_third():
    with pytest.raises(
        ValueError, match=r"starts to decay at a third of total_steps=60: warm up for at most 20 steps"
    ):
        wsd_schedule(optimizer_by_block(), warmup_steps=21, total_steps=60)


def test_a_floor_above_a_peak_is_refused_with_the_numbers():
    with pytest.raises(
        ValueError, match=r"floor=0.01 is not between 0 and the base learning rate 0.001: lower the floor"
    ):
        cosine_schedule(optimizer_by_block(), warmup_steps=WARMUP, total_steps=TOTAL, floor=0.01)
    with pytest.raises(
        ValueError, match=r"floor=2 is not between 0 and the peak learning rate 1: lower the floor"
    ):
        cosine(0, peak=1.0, warmup_steps=1, total_steps=10, floor=2.0)


@pytest.mark.parametrize(
    "bad",
    [{"floor_mode": "none"}, {"warmup": "steep"}, {"warmup_start": "middle"}],
    ids=lambda bad: next(iter(bad)),
)
def test_an_unknown_mode_is_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name} is '.*'; expected \"(shared|above_zero)\" or"):
        cosine_schedule(optimizer_by_block(), warmup_steps=WARMUP, total_steps=TOTAL, **bad)
