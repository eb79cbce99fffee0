"""metrics.jsonl: what a crash leaves is dropped, damage is named, spikes are marked."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockwise_lr.errors import UserError
from blockwise_lr.train.metrics import MetricsFile, read_metrics
from blockwise_lr.train.spikes import is_spike


def row(step, loss=3.0, **more):
    return {"step": step, "train_loss": loss, "val_loss": None, "seconds": float(step), **more}


def line(step):
    return json.dumps(row(step)).encode() + b"\n"


@pytest.mark.parametrize(
    "end",
    [b'{"step": 3, "sec', b"\x00" * 100, b"\xff", b"[]", b"{}\n", b'{"step": 3}\n', b"[" * 10**5, b"\n\n"],
)
def test_what_a_crash_left_at_the_end_is_dropped(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2) + end)
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    MetricsFile(path, resume_step=2).append(row(3))
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    "damage", [b"[]", b"{}", b'{"step": 1}', b'{"step": "1", "seconds": 1}', b"\xff", b"x" * 9]
)
def test_a_damaged_line_with_whole_ones_behind_it_is_named(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + damage + b"\n" + line(3))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is damaged, and whole ones follow: restore"):
        read_metrics(path)


@given(st.binary())
def test_whatever_the_file_holds_it_is_rows_or_a_message(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    try:
        rows = read_metrics(path)
    except UserError:
        return
    assert all(isinstance(r["step"], int) for r in rows)


def test_a_spike_is_marked_also_right_after_resuming(tmp_path):
    path = tmp_path / "metrics.jsonl"
    losses = [3.0, 3.1, 2.9, 3.0, 3.05, 2.95, 3.0, 4.0, 3.0, None, 3.02]
    metrics = MetricsFile(path, resume_step=0)
    for step, loss in enumerate(losses[:7], 1):
        metrics.append(row(step, loss))
    metrics = MetricsFile(path, resume_step=7)
    for step, loss in enumerate(losses[7:], 8):
        metrics.append(row(step, loss))
    assert [r["step"] for r in read_metrics(path) if r.get("spike")] == [8]


def test_spikes():
    smooth = [3.0 - 0.01 * i for i in range(20)]
    assert not is_spike(2.8, smooth)  # falling
    assert not is_spike(3.0, smooth)  # a little higher again
    assert is_spike(4.0, smooth)
    assert is_spike(3.1, [3.0] * 20)  # 0.5 % is all that a curve without noise is allowed, six times
    assert not is_spike(3.08, [3.0] * 20)
    assert is_spike(4.0, [*smooth[:10], 4.0, 4.1, *smooth[10:18]])  # those before do not hide it
    assert not is_spike(9.0, smooth[:4])  # too little to compare with
    assert not is_spike(None, smooth)
