"""SharpnessMonitor in loops of one's own, and the file that it writes."""

import copy
import json
import math

import pytest
import torch

from blockwise_lr import Block, classify, measure_sharpness, split_fused
from blockwise_lr.sharpness.monitor import SharpnessMonitor, read_reports
from blockwise_lr.sharpness.records import append_report, keep_reports
from support.tiny_models import gpt2

STEPS = 6


def batch(seed, rows=4):
    ids = torch.randint(40, (rows, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


HELD_OUT = [batch(1000), batch(1001), batch(1002)]
TOKENS = 4 * 11


def loop(monitors=(), model=None, steps=STEPS):
    """A training loop as a user would write it; returns the model, its losses and the random state at the end."""
    model = gpt2() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    made = [make(model, optimizer) for make in monitors]
    readers = [m for m in made if m.reads_gradients]
    others = [m for m in made if not m.reads_gradients]
    torch.manual_seed(1)
    losses = []
    for monitor in others:
        monitor.step(0)
    for step in range(1, steps + 1):
        loss = model(**batch(step)).loss
        loss.backward()
        for monitor in readers:
            monitor.gradients(step - 1)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        for monitor in others:
            monitor.step(step)
    return model, losses, torch.get_rng_state()


def means(report):
    return {block.value: found.mean for block, found in report.items()}


def test_a_watched_training_ends_with_the_same_weights_losses_and_random_state_to_the_bit(tmp_path):
    alone, losses, state = loop()
    path = tmp_path / "sharpness.jsonl"
    watched, same_losses, same_state = loop(
        [
            lambda m, o: SharpnessMonitor(m, HELD_OUT, every=1, path=path),
            lambda m, o: SharpnessMonitor(m, HELD_OUT, every=2, path=path, estimator="hutchinson"),
            lambda m, o: SharpnessMonitor(
                m, every=1, path=path, estimator="optimizer", optimizer=o, tokens_per_step=TOKENS
            ),
            lambda m, o: SharpnessMonitor(
                m, every=1, path=path, estimator="empirical", tokens_per_step=TOKENS
            ),
        ]
    )
    assert same_losses == losses
    assert torch.equal(same_state, state)
    for name, value in watched.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name]), name
    assert watched.training
    written = [(report.estimator, report.step) for report in read_reports(path)]
    assert sorted(written) == sorted(
        [("fisher", step) for step in range(7)]
        + [("hutchinson", step) for step in (0, 2, 4, 6)]
        + [("optimizer", step) for step in range(1, 7)]  # Adam has seen nothing at step 0
        + [("empirical", step) for step in range(6)]  # the gradient at the last model is never computed
    )


def test_every_line_is_what_measure_sharpness_says_of_the_model_at_that_step(tmp_path):
    models = {}

    class Keeping(SharpnessMonitor):
        def step(self, step):
            models[step] = copy.deepcopy(self._model)
            return super().step(step)

    path = tmp_path / "sharpness.jsonl"
    loop([lambda m, o: Keeping(m, HELD_OUT, at=(0, 3), path=path, seed=5, probes=2)])
    found = read_reports(path)
    assert [report.step for report in found] == [0, 3]
    for report in found:
        expected = measure_sharpness(models[report.step], HELD_OUT, seed=5, probes=2, step=report.step)
        assert report == expected
    assert means(found[0]) != means(found[1])


@pytest.mark.parametrize("split", [False, True])
def test_the_gradients_of_training_give_the_empirical_estimate_of_their_batch(split):
    model = gpt2(dropout=0.0)
    if split:
        split_fused(model)
    monitor = SharpnessMonitor(model, at=[7], path=None, estimator="empirical", tokens_per_step=2 * TOKENS)
    for seed in (1, 2):  # two micro-batches of one step
        (model(**batch(seed)).loss / 2).backward()
    kept = [p.grad.clone() for p in model.parameters()]
    report = monitor.gradients(7)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), kept))
    expected = measure_sharpness(model, [batch(1), batch(2)], estimator="empirical", accumulate=2, step=7)
    assert report.step == 7
    assert report.samples == expected.samples == 2 * TOKENS
    assert set(report.per_parameter) == set(expected.per_parameter)
    for name, found in report.per_parameter.items():
        assert found.mean == pytest.approx(expected.per_parameter[name].mean, rel=1e-5), name
        assert math.isnan(found.stderr)
    by_hand = (
        2
        * TOKENS
        * sum(
            p.grad.double().square().sum().item()
            for name, p in model.named_parameters()
            if classify(model)[name] is Block.NORM
        )
    )
    assert report[Block.NORM].mean == pytest.approx(by_hand / report[Block.NORM].numel, rel=1e-12)
    fused = "transformer.h.0.attn.c_attn.weight"
    assert (f"{fused}:q" in report.per_parameter) is not split


def test_gradients_that_are_scaled_give_the_same():
    model = gpt2(dropout=0.0)
    model(**batch(0)).loss.backward()
    monitor = SharpnessMonitor(model, at=[0], path=None, estimator="empirical", tokens_per_step=TOKENS)
    plain = monitor.gradients(0)
    for parameter in model.parameters():
        parameter.grad.mul_(1024.0)  # as a GradScaler's loss would leave them
    assert means(monitor.gradients(0, scale=1024.0)) == means(plain)


def test_empirical_is_measured_on_batches_where_they_are_given():
    model = gpt2()
    monitor = SharpnessMonitor(model, HELD_OUT, at=[0], path=None, estimator="empirical")
    assert means(monitor.step(0)) == means(measure_sharpness(model, HELD_OUT, estimator="empirical"))


def test_steps_that_are_not_due_are_left_out(tmp_path):
    path = tmp_path / "sharpness.jsonl"
    monitor = SharpnessMonitor(gpt2(), HELD_OUT[:1], every=10, at=(3,), path=path)
    measured = [step for step in range(32) if monitor.step(step) is not None]
    assert measured == [0, 3, 10, 20, 30] == [report.step for report in read_reports(path)]


def test_the_precision_is_that_of_the_context():
    model = gpt2()
    exact, half = (
        SharpnessMonitor(model, HELD_OUT, at=[0], path=None, **context).step(0)
        for context in ({}, {"context": lambda: torch.autocast("cpu", torch.bfloat16)})
    )
    assert means(half) != means(exact)
    for block, found in half.items():
        assert found.mean == pytest.approx(exact[block].mean, rel=0.1)


def test_a_data_loader_of_held_out_batches_leaves_the_random_state_alone():
    rows = [{name: value[0] for name, value in batch(seed, rows=1).items()} for seed in range(8)]
    loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True)
    model, state = gpt2(), torch.get_rng_state()
    monitor = SharpnessMonitor(model, loader, every=1, path=None)
    first, second = monitor.step(0), monitor.step(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.batches == 2
    assert means(first) == means(second)  # the same windows and labels at every step


class TestFile:
    @pytest.fixture
    def reports(self):
        model = gpt2()
        return [measure_sharpness(model, HELD_OUT[:1], step=step, seed=step) for step in range(4)]

    def test_what_was_measured_is_read_again(self, tmp_path, reports):
        path = tmp_path / "sharpness.jsonl"
        for report in reports:
            append_report(path, report)
        assert list(map(means, read_reports(path))) == list(map(means, reports))
        assert len(path.read_text().splitlines()) == 4

    @pytest.mark.parametrize("left", [1, 40, -1])
    def test_a_line_that_a_crash_cut_short_is_left_out_and_then_replaced(self, tmp_path, reports, left):
        path = tmp_path / "sharpness.jsonl"
        for report in reports:
            append_report(path, report)
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:3]) + lines[3][:left])
        assert [report.step for report in read_reports(path)] == [0, 1, 2]
        keep_reports(path, lambda report: True)
        append_report(path, reports[3])
        assert path.read_bytes() == whole

    def test_a_damaged_line_is_named(self, tmp_path, reports):
        path = tmp_path / "sharpness.jsonl"
        append_report(path, reports[0])
        with path.open("a") as file:
            file.write("garbage\n")
        append_report(path, reports[1])
        with pytest.raises(ValueError, match=r"sharpness.jsonl, line 2: Expecting value"):
            read_reports(path)

    def test_a_line_of_something_else_is_named(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n')
        with pytest.raises(ValueError, match="metrics.jsonl, line 1: not a sharpness report"):
            read_reports(path)

    def test_a_sharpness_json_is_read_with_its_earlier_checkpoints_first(self, tmp_path, reports):
        path = tmp_path / "sharpness.json"
        *earlier, last = (report.to_dict() for report in reports)
        path.write_text(json.dumps({**last, "earlier": earlier}))
        assert [report.step for report in read_reports(path)] == [0, 1, 2, 3]
        reports[2].to_json(path)
        assert [report.step for report in read_reports(path)] == [2]
        path.write_text("[]")
        with pytest.raises(ValueError, match="sharpness.json: not a sharpness report"):
            read_reports(path)

    def test_one_estimator_can_be_asked_for(self, tmp_path, reports):
        path = tmp_path / "sharpness.jsonl"
        append_report(path, reports[0])
        append_report(path, measure_sharpness(gpt2(), HELD_OUT[:1], estimator="empirical", step=1))
        assert [report.step for report in read_reports(path, estimator="fisher")] == [0]
        assert [report.step for report in read_reports(path, estimator="empirical")] == [1]

    def test_a_new_monitor_replaces_the_file_and_a_resumed_one_keeps_the_lines_before(self, tmp_path):
        path = tmp_path / "sharpness.jsonl"

        def monitors(**more):
            model = gpt2()
            model(**batch(0)).loss.backward()
            fisher = SharpnessMonitor(model, HELD_OUT[:1], every=1, path=path, **more)
            empirical = SharpnessMonitor(
                model, every=1, path=path, estimator="empirical", tokens_per_step=TOKENS, **more
            )
            return fisher, empirical

        def written():
            return [(report.step, report.estimator) for report in read_reports(path)]

        fisher, empirical = monitors()
        for step in range(3):
            fisher.step(step)
            empirical.gradients(step)
        monitors(resume_step=2)
        # The gradient at the model of step 2 is computed again by the step that follows.
        assert written() == [
            (0, "fisher"), (0, "empirical"), (1, "fisher"), (1, "empirical"), (2, "fisher"),
        ]  # fmt: skip
        monitors()
        assert written() == []

    def test_the_folder_of_the_file_is_made(self, tmp_path):
        path = tmp_path / "a" / "b" / "sharpness.jsonl"
        SharpnessMonitor(gpt2(), HELD_OUT[:1], at=[0], path=path).step(0)
        assert len(read_reports(path)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"every": 1, "estimator": "fish"},
            "estimator is 'fish'; expected one of fisher, empirical, hutchinson",
        ),
        ({}, "no step to measure at: give every=..., at=..., or both"),
        ({"every": -1}, r"steps to measure at are every -1, at \[\]; expected 0 or more"),
        ({"at": [2, -3]}, r"steps to measure at are every 0, at \[-3, 2\]; expected 0 or more"),
        ({"every": 1, "batches": None}, 'estimator="fisher" needs batches: a few held-out ones'),
        ({"every": 1, "batches": []}, "batches is empty; expected at least one batch"),
        (
            {"every": 1, "batches": None, "estimator": "empirical"},
            r'estimator="empirical" needs tokens_per_step=..., the predicted tokens in one optimizer step over all '
            r"processes: sequences \* \(length - 1\) for a causal language model \(given: None\)",
        ),
        (
            {"every": 1, "estimator": "optimizer", "tokens_per_step": 0},
            r"needs tokens_per_step.* \(given: 0\)",
        ),
        (
            {"every": 1, "estimator": "optimizer", "tokens_per_step": 8},
            'estimator="optimizer" needs optimizer=..., the one that trains the model',
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_when_it_is_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        SharpnessMonitor(gpt2(), **{"batches": HELD_OUT, "path": None, **arguments})


def test_the_wrong_call_is_refused_with_the_right_one():
    model = gpt2()
    reader = SharpnessMonitor(model, every=1, path=None, estimator="empirical", tokens_per_step=TOKENS)
    with pytest.raises(
        ValueError, match=r"reads the gradients of training: call gradients\(step\) between backward"
    ):
        reader.step(0)
    with pytest.raises(ValueError, match=r"no parameter has a gradient: read them after loss.backward\(\)"):
        reader.gradients(0)
    model(**batch(0)).loss.backward()
    with pytest.raises(ValueError, match="scale is 0.0; expected a number above 0"):
        reader.gradients(0, scale=0.0)
    for settings, said in (({}, "fisher"), ({"estimator": "empirical"}, '"empirical" and batches')):
        other = SharpnessMonitor(model, HELD_OUT, every=1, path=None, **settings)
        with pytest.raises(ValueError, match=rf"{said}.*: call step\(step\)"):
            other.gradients(0)
