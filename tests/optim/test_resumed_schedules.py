"""A schedule's progress is loaded, its settings are those it was made with; in any order of making and loading."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import json
import math
import pickle
import warnings
import weakref

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR

from blockwise_lr import cosine_schedule, scale_by_block, wsd_schedule
from blockwise_lr.optim import block_lr, load_optimizer_state
from blockwise_lr.optim.load_hooks import compare_when_loading

RATIOS = {"norm": 1.0, "vo": 4.0, "emb": 10.0}
BASE, DONE = 1e-3, 20
SHAPES = {"cosine": cosine_schedule, "wsd": wsd_schedule}
EARLIER = (  # what an earlier version saved
    "shape", "warmup_steps", "total_steps", "floor", "floor_mode", "warmup", "base_lrs", "last_epoch", "_step_count",
    "_last_lr", "_is_initial", "_get_lr_called_within_step",
)  # fmt: skip


def make_optimizer(base=BASE, ratios=RATIOS, weight_decay=0.1, **options):
    groups = [
        {
            "params": [torch.nn.Parameter(torch.ones(2))],
            "lr": ratio * base,
            "initial_lr": ratio * base,
            "lr_ratio": ratio,
            "block": block,
            "decay": "coupled",
            "weight_decay": weight_decay,
            "names": [f"{block}.weight"],
        }
        for block, ratio in ratios.items()
    ]
    return torch.optim.AdamW(groups, lr=base, **options)


def update(optimizer, schedule):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule.step()


def saved(make=cosine_schedule, steps=DONE, optimizer=None, **settings):
    """The states of optimizer and schedule after some steps, as a file would give them back."""
    optimizer = optimizer or make_optimizer()
    schedule = make(optimizer, **{"warmup_steps": 2, "total_steps": 20, "floor": 5e-5, **settings})
    for _ in range(steps):
        update(optimizer, schedule)
    return copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))


def expected(shape, step, total=60, warmup=2, floor=5e-5, base=BASE, ratios=RATIOS):
    return [
        block_lr(
            step, peak=r * base, ratio=r, shape=shape, warmup_steps=warmup, total_steps=total, floor=floor
        )
        for r in ratios.values()
    ]


def lrs(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


@contextlib.contextmanager
def recorded():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


ORDERS = [
    order
    for order in itertools.permutations(("make schedule", "load optimizer", "load schedule"))
    if order.index("make schedule") < order.index("load schedule")
]


@pytest.mark.parametrize("order", ORDERS, ids=" then ".join)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("total", [20, 60], ids=["same", "longer"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.filterwarnings("ignore:the schedule goes on")
def test_every_update_has_the_rate_of_its_step_whatever_was_made_and_loaded_first(
    order, shape, total, as_tensor
):
    states = saved(SHAPES[shape], steps=7, warmup_steps=2)
    optimizer = make_optimizer()
    if as_tensor:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    schedule = None
    for what in order:
        if what == "make schedule":
            schedule = SHAPES[shape](optimizer, warmup_steps=2, total_steps=total, floor=5e-5)
        elif what == "load optimizer":
            optimizer.load_state_dict(states[0])
        else:
            schedule.load_state_dict(states[1])
    for step in range(7, 12):
        assert lrs(optimizer) == pytest.approx(expected(shape, step, total), rel=1e-9)
        assert [float(lr) for lr in schedule.get_last_lr()] == pytest.approx(lrs(optimizer))
        update(optimizer, schedule)


@pytest.mark.parametrize("order", ORDERS, ids=" then ".join)
def test_torchs_own_cosine_is_right_in_the_same_orders(order):
    """The witness: what users may expect of any scheduler."""

    def make(optimizer):
        return CosineAnnealingLR(optimizer, T_max=20)

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=BASE)
    schedule = make(optimizer)
    for _ in range(7):
        update(optimizer, schedule)
    states = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    resumed = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=BASE)
    for what in order:
        if what == "make schedule":
            schedule = make(resumed)
        elif what == "load optimizer":
            resumed.load_state_dict(states[0])
        else:
            schedule.load_state_dict(states[1])
    assert lrs(resumed) == pytest.approx(lrs(optimizer))


@pytest.mark.parametrize("shape", SHAPES)
def test_settings_are_those_asked_for_and_one_warning_names_the_changes(shape):
    states = saved(SHAPES[shape])
    optimizer = make_optimizer()
    schedule = SHAPES[shape](optimizer, warmup_steps=6, total_steps=60, floor=1e-4, floor_mode="proportional")
    optimizer.load_state_dict(states[0])
    with recorded() as caught:
        schedule.load_state_dict(states[1])
    (warning,) = caught
    assert str(warning.message) == (
        "the schedule goes on at step 20 with other settings than it was saved with: total_steps 20 -> 60; "
        "warmup_steps 2 -> 6; floor 5e-05 -> 0.0001; floor_mode shared -> proportional"
    )
    assert (schedule.total_steps, schedule.warmup_steps, schedule.floor) == (60, 6, 1e-4)
    fresh_optimizer = make_optimizer()
    fresh = SHAPES[shape](
        fresh_optimizer, warmup_steps=6, total_steps=60, floor=1e-4, floor_mode="proportional"
    )
    for _ in range(DONE):
        update(fresh_optimizer, fresh)
    for _ in range(40):
        assert lrs(optimizer) == pytest.approx(lrs(fresh_optimizer))
        update(optimizer, schedule)
        update(fresh_optimizer, fresh)


def test_another_shape_is_a_setting_too():
    states = saved(cosine_schedule, steps=5)
    optimizer = make_optimizer()
    schedule = wsd_schedule(optimizer, warmup_steps=2, total_steps=20, floor=5e-5)
    optimizer.load_state_dict(states[0])
    with pytest.warns(UserWarning, match="shape cosine -> wsd"):
        schedule.load_state_dict(states[1])
    assert lrs(optimizer) == pytest.approx(expected("wsd", 5, 20))


def test_nothing_is_said_where_nothing_has_changed():
    states = saved()
    optimizer = make_optimizer()
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=20, floor=5e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(states[0])
        schedule.load_state_dict(states[1])


def test_fewer_steps_than_are_done_is_an_error():
    states = saved()
    schedule = cosine_schedule(make_optimizer(), warmup_steps=2, total_steps=10)
    with pytest.raises(
        ValueError, match=r"20 steps are done, and the schedule was made for total_steps=10: make it for more"
    ):
        schedule.load_state_dict(states[1])
    # A run that went on at its floor may go on so.
    states = saved(steps=25)
    schedule = cosine_schedule(make_optimizer(), warmup_steps=2, total_steps=20, floor=5e-5)
    schedule.load_state_dict(states[1])
    assert schedule.last_epoch == 25


def test_a_state_that_is_none_is_an_error():
    schedule = cosine_schedule(make_optimizer(), warmup_steps=2, total_steps=10)
    with pytest.raises(ValueError, match=r"has last_epoch=None; expected the number of steps done"):
        schedule.load_state_dict({"state": {}, "param_groups": []})


def test_states_of_earlier_versions_load_and_began_their_warm_up_at_zero(tmp_path):
    optimizer_state, state = saved(steps=1, warmup_start="zero", warmup_steps=4)
    earlier = {key: value for key, value in state.items() if key in EARLIER}
    torch.save({"o": optimizer_state, "s": earlier}, tmp_path / "old.pt")
    loaded = torch.load(tmp_path / "old.pt", weights_only=True)
    optimizer = make_optimizer()
    schedule = cosine_schedule(optimizer, warmup_steps=4, total_steps=20, floor=5e-5)
    optimizer.load_state_dict(loaded["o"])
    with pytest.warns(
        UserWarning, match=r"other settings than it was saved with: warmup_start zero -> above_zero$"
    ):
        schedule.load_state_dict(pickle.loads(pickle.dumps(loaded["s"])))
    assert lrs(optimizer) == pytest.approx([r * BASE * 2 / 4 for r in RATIOS.values()])
    # After the warm-up its start makes no difference.
    _, state = saved(steps=9, warmup_start="zero")
    schedule = cosine_schedule(make_optimizer(), warmup_steps=2, total_steps=20, floor=5e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.load_state_dict({key: value for key, value in state.items() if key in EARLIER})


def test_what_is_saved_is_plain_and_readable_by_earlier_versions():
    _, state = saved()
    assert set(EARLIER) <= set(state)
    assert json.loads(json.dumps(state)) == state


def test_a_group_that_was_added_is_loaded_with_its_rate():
    def with_new_group(optimizer):
        optimizer.add_param_group(
            {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 3 * BASE, "lr_ratio": 3.0, "names": ["new"]}
        )

    optimizer = make_optimizer()
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=20, floor=5e-5)
    for step in range(7):
        update(optimizer, schedule)
        if step == 3:
            with_new_group(optimizer)
    states = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    for late in (False, True):
        resumed = make_optimizer()
        if not late:
            with_new_group(resumed)
        goes_on = cosine_schedule(resumed, warmup_steps=2, total_steps=20, floor=5e-5)
        if late:
            with_new_group(resumed)
        resumed.load_state_dict(states[0])
        goes_on.load_state_dict(states[1])
        assert lrs(resumed) == pytest.approx(expected("cosine", 7, 20, ratios={**RATIOS, "new": 3.0}))


def test_last_epoch_counts_as_in_torch():
    optimizer_state, _ = saved(steps=7)
    optimizer = make_optimizer()
    optimizer.load_state_dict(optimizer_state)
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=20, floor=5e-5, last_epoch=6)
    assert schedule.last_epoch == 7
    assert lrs(optimizer) == pytest.approx(expected("cosine", 7, 20))
    late = cosine_schedule(make_optimizer(), warmup_steps=2, total_steps=20, floor=5e-5, last_epoch=6)
    late.optimizer.load_state_dict(optimizer_state)
    assert lrs(late.optimizer) == pytest.approx(expected("cosine", 7, 20))


def test_another_scheduler_of_the_same_optimizer_keeps_its_turn():
    def make(optimizer):
        ours = cosine_schedule(optimizer, warmup_steps=0, total_steps=20, floor=5e-5)
        first = LinearLR(optimizer, start_factor=0.5, total_iters=10)
        return SequentialLR(optimizer, [first, ours], milestones=[10])

    optimizer = make_optimizer()
    schedule = make(optimizer)
    for _ in range(5):
        update(optimizer, schedule)
    states = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    resumed = make_optimizer()
    goes_on = make(resumed)
    resumed.load_state_dict(states[0])
    goes_on.load_state_dict(states[1])
    for _ in range(10):
        assert lrs(resumed) == pytest.approx(lrs(optimizer))
        update(optimizer, schedule)
        update(resumed, goes_on)


def test_a_plain_trainers_scheduler_and_ours_take_each_others_state():
    _, state = saved(steps=7)
    plain = LambdaLR(make_optimizer(), lambda step: 1.0)
    plain.load_state_dict(copy.deepcopy(state))
    assert plain.last_epoch == 7
    assert plain.base_lrs == [r * BASE for r in RATIOS.values()]
    optimizer = make_optimizer()
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=20, floor=5e-5)
    schedule.load_state_dict(plain.state_dict())
    assert lrs(optimizer) == pytest.approx(expected("cosine", 7, 20))


# Other settings of the groups -----------------------------------------------------------------------


def test_other_ratios_and_another_base_rate_are_an_error_that_names_both():
    states = saved(steps=7)
    optimizer = make_optimizer(base=2e-3, ratios={**RATIOS, "emb": 5.0})
    before = lrs(optimizer)
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=20, floor=5e-5)
    with pytest.raises(ValueError) as raised:
        optimizer.load_state_dict(states[0])
    assert str(raised.value) == (
        "the saved optimizer has other settings: base learning rate is 0.001 there and 0.002 here; "
        'ratio of emb is 10 there and 5 here; make the groups as they were (ratios="paper"), or go on with the new '
        'ones by on_change="use_new"'
    )
    assert [g["initial_lr"] for g in optimizer.param_groups] == before
    assert schedule.last_epoch == 0


@pytest.mark.parametrize("first", ["optimizer", "schedule"])
def test_use_new_takes_the_new_settings_and_the_old_moments(first):
    states = saved(steps=7)
    ratios = {**RATIOS, "emb": 5.0}
    optimizer = make_optimizer(base=2e-3, ratios=ratios, weight_decay=0.3, betas=(0.8, 0.9))
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=20, floor=5e-5, on_change="use_new")
    with recorded() as caught:
        if first == "optimizer":
            optimizer.load_state_dict(states[0])
            schedule.load_state_dict(states[1])
        else:
            schedule.load_state_dict(states[1])
            optimizer.load_state_dict(states[0])
    assert "base learning rate is 0.001 there and 0.002 here" in " ".join(str(w.message) for w in caught)
    if first == "optimizer":
        assert len(caught) == 1
    assert lrs(optimizer) == pytest.approx(expected("cosine", 7, 20, base=2e-3, ratios=ratios))
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.3}
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    moment = optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"]
    assert torch.equal(moment, states[0]["state"][0]["exp_avg"])


def test_a_loop_that_loads_the_optimizer_first_has_a_function_for_it():
    states = saved(steps=7)
    optimizer = make_optimizer(base=2e-3)
    with pytest.raises(ValueError, match="base learning rate is 0.001 there and 0.002 here"):
        load_optimizer_state(optimizer, states[0])
    with pytest.warns(UserWarning, match="goes on with new settings: base learning rate is 0.001 there"):
        load_optimizer_state(optimizer, states[0], on_change="use_new")
    assert lrs(optimizer) == [r * 2e-3 for r in RATIOS.values()]
    assert len(optimizer.state) == 3
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=20, floor=5e-5)
    with pytest.warns(UserWarning, match=r"initial_lr of norm 0.001 -> 0.002"):
        schedule.load_state_dict(states[1])
    assert lrs(optimizer) == pytest.approx(expected("cosine", 7, 20, base=2e-3))


def test_other_hyperparameters_are_loaded_as_torch_does_and_named_once():
    states = saved(steps=7)
    optimizer = make_optimizer(weight_decay=0.3, betas=(0.9, 0.95))
    cosine = cosine_schedule(optimizer, warmup_steps=2, total_steps=20, floor=5e-5)
    with recorded() as caught:
        optimizer.load_state_dict(states[0])
        cosine.load_state_dict(states[1])
    (warning,) = caught
    assert (
        "which are used: weight_decay of norm is 0.1 there and 0.3 here; betas is (0.9, 0.999) there"
        in str(warning.message)
    )
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.1}


def test_ratios_that_auto_has_moved_are_no_difference():
    states = saved(steps=7)
    for group in states[0]["param_groups"]:
        group["lr_ratio"] *= 1.7
        group["initial_lr"] *= 1.7
    states[0]["param_groups"][1]["auto_mean"] = 0.1  # as earlier versions marked it
    optimizer = make_optimizer()
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=20, floor=5e-5)
    optimizer.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    ratios = {block: 1.7 * ratio for block, ratio in RATIOS.items()}
    assert lrs(optimizer) == pytest.approx(expected("cosine", 7, 20, ratios=ratios))


def constant(base_decay, ratios=RATIOS):
    """An optimizer whose groups have ``decay="constant"``, as ``param_groups`` makes them."""
    optimizer = make_optimizer(ratios=ratios)
    for group in optimizer.param_groups:
        group.update(decay="constant", weight_decay=base_decay / group["lr_ratio"])
    return optimizer


@pytest.mark.parametrize("on_change", ["error", "use_new"])
@pytest.mark.parametrize("ratios", [RATIOS, dict.fromkeys(RATIOS, 1.0)], ids=["same ratios", "uniform"])
def test_another_constant_decay_is_told_and_taken_also_before_the_schedule_is_made(ratios, on_change):
    state, _ = saved(steps=7, optimizer=constant(0.1))
    optimizer = constant(0.3, ratios)
    if on_change == "error" and ratios is not RATIOS:
        return  # other ratios are an error
    with pytest.warns(UserWarning, match="weight_decay of vo is 0.1 there and 0.3 here"):
        load_optimizer_state(optimizer, state, on_change=on_change)
    cosine_schedule(optimizer, warmup_steps=2, total_steps=20, floor=5e-5)
    decay = 0.3 if on_change == "use_new" else 0.1
    assert [g["weight_decay"] * g["lr_ratio"] for g in optimizer.param_groups] == pytest.approx([decay] * 3)


@pytest.mark.parametrize("first", ["optimizer", "schedule"])
@pytest.mark.parametrize("decay", ["coupled", "constant"])
def test_use_new_takes_the_new_weight_decay_under_moved_ratios(decay, first):
    states = saved(steps=7)
    for group in states[0]["param_groups"]:
        group["lr_ratio"] *= 2
        group["initial_lr"] *= 2
        group["auto_moves"] = True
    optimizer = constant(0.3) if decay == "constant" else make_optimizer(weight_decay=0.3)
    new = {"warmup_steps": 2, "total_steps": 20, "floor": 5e-5, "on_change": "use_new"}
    if first == "schedule":
        schedule = cosine_schedule(optimizer, **new)
    with pytest.warns(UserWarning, match="weight_decay of norm is 0.1 there and 0.3 here"):
        load_optimizer_state(optimizer, states[0], on_change="use_new")
    if first == "optimizer":
        schedule = cosine_schedule(optimizer, **new)
    schedule.load_state_dict({**states[1], "last_epoch": 2})  # the end of the warm-up
    for group, ratio in zip(optimizer.param_groups, RATIOS.values()):
        assert group["decay"] == decay
        assert group["lr_ratio"] == 2 * ratio
        scale = group["lr_ratio"] if decay == "constant" else 1
        assert group["weight_decay"] * scale == pytest.approx(0.3)


@pytest.mark.parametrize("on_change", ["error", "use_new"])
def test_blocks_and_names_are_those_of_this_model(on_change):
    ratios = dict.fromkeys(RATIOS, 1.0)
    state, _ = saved(steps=7, optimizer=make_optimizer(ratios=ratios))
    optimizer = make_optimizer(ratios=ratios)
    optimizer.param_groups[1]["block"] = "ffn"  # classified with an override since
    optimizer.param_groups[1]["names"] = ["_orig_mod.vo.weight"]
    load_optimizer_state(optimizer, state, on_change=on_change)
    assert [g["block"] for g in optimizer.param_groups] == ["norm", "ffn", "emb"]
    assert optimizer.param_groups[1]["names"] == ["_orig_mod.vo.weight"]


@pytest.mark.parametrize("first", ["optimizer", "schedule"])
def test_a_run_under_one_cycle_resumes_in_either_order(first):
    def cycle(optimizer, peak=BASE):
        return scale_by_block(OneCycleLR(optimizer, max_lr=peak, total_steps=20))

    optimizer = make_optimizer()
    schedule = cycle(optimizer)
    for _ in range(7):
        update(optimizer, schedule)
    state, progress = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(schedule.state_dict())
    resumed = make_optimizer()
    if first == "schedule":
        other = cycle(resumed)
    with recorded():  # OneCycleLR has moved the betas
        load_optimizer_state(resumed, state)
    if first == "optimizer":
        other = cycle(resumed)
    other.load_state_dict(progress)
    for _ in range(5):
        update(optimizer, schedule)
        update(resumed, other)
        assert lrs(resumed) == pytest.approx(lrs(optimizer))

    resumed = make_optimizer()
    other = cycle(resumed, 2 * BASE)
    with pytest.warns(UserWarning, match="goes on with new settings"):
        load_optimizer_state(resumed, state, on_change="use_new")
    assert {g["max_lr"] for g in resumed.param_groups} == {2 * BASE}


def test_after_one_cycle_another_schedule_has_the_peaks_of_the_groups():
    optimizer = make_optimizer()
    schedule = scale_by_block(OneCycleLR(optimizer, max_lr=BASE, total_steps=20))
    update(optimizer, schedule)
    resumed = make_optimizer()
    with recorded():
        load_optimizer_state(resumed, optimizer.state_dict())
    cosine_schedule(resumed, warmup_steps=0, total_steps=20)
    assert lrs(resumed) == pytest.approx([BASE * ratio for ratio in RATIOS.values()])


@pytest.mark.parametrize("adam_mini", ["there", "here"])
def test_moments_of_other_shapes_are_an_error_that_names_the_way(adam_mini):
    state, _ = saved(steps=7)
    optimizer = make_optimizer()
    groups = state["param_groups"] if adam_mini == "there" else optimizer.param_groups
    for group in groups:
        group["partitions"] = [[1]]
    with pytest.raises(ValueError, match=rf"it is .*Adam-mini {adam_mini}.*adopt_state\(state, model, opt"):
        load_optimizer_state(optimizer, state, on_change="use_new")


def test_other_groups_are_an_error_that_names_the_way():
    states = saved(steps=7)
    fewer = {"norm": 1.0, "emb": 10.0}
    optimizer = make_optimizer(ratios=fewer)
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=20)
    with pytest.raises(
        ValueError,
        match=r"vo.weight is in block vo there and in no group here: .* adopt_state\(state, model, opt",
    ):
        optimizer.load_state_dict(states[0])
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2)) for _ in range(3)], lr=BASE)
    with pytest.raises(ValueError, match=r"has groups of \[3\] parameters without names, .* adopt_state"):
        optimizer.load_state_dict(plain.state_dict())
    assert schedule.last_epoch == 0


def test_an_unknown_on_change_is_refused():
    with pytest.raises(ValueError, match='on_change is \'adopt\'; expected "error" or "use_new"'):
        cosine_schedule(make_optimizer(), warmup_steps=2, total_steps=20, on_change="adopt")


# Who owns the hooks ----------------------------------------------------------------------------------


def hooks(optimizer):
    return len(optimizer._optimizer_load_state_dict_pre_hooks), len(
        optimizer._optimizer_load_state_dict_post_hooks
    )


def test_the_hooks_go_with_their_schedule_and_the_newest_has_them():
    optimizer = make_optimizer()
    first = cosine_schedule(optimizer, warmup_steps=2, total_steps=20)
    second = wsd_schedule(optimizer, warmup_steps=2, total_steps=20)
    assert hooks(optimizer) == (1, 1)
    del first
    gc.collect()
    assert hooks(optimizer) == (1, 1)
    gone = weakref.ref(second)
    del second
    gc.collect()
    assert gone() is None
    assert hooks(optimizer) == (0, 0)


def test_a_schedule_that_is_gone_leaves_the_comparison_to_the_optimizer():
    optimizer = make_optimizer(base=2e-3)
    compare_when_loading(optimizer)
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=20)
    del schedule
    gc.collect()
    with pytest.raises(ValueError, match="base learning rate is 0.001 there and 0.002 here"):
        optimizer.load_state_dict(saved(steps=7)[0])


def test_copies_and_pickles_of_a_schedule_work():
    optimizer = make_optimizer()
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=20)
    for _ in range(3):
        update(optimizer, schedule)
    copied = copy.deepcopy(schedule)
    copied.optimizer.step()
    copied.step()
    assert (copied.last_epoch, schedule.last_epoch) == (4, 3)
    assert math.isclose(copied.get_last_lr()[0], expected("cosine", 4, 20, floor=0.0)[0])
