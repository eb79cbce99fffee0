"""The same numbers on one process and on two."""

import runpy
from pathlib import Path

import pytest
import torch

from blockwise_lr.sharpness.monitor import _share, read_reports
from support.processes import run_ranks

SCRIPT = Path(__file__).with_name("watched_training.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    script = runpy.run_path(str(SCRIPT))
    script["own_loop"](one)
    script["trainer"](one)
    done = run_ranks(SCRIPT, two, processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    return one, two


@pytest.mark.parametrize("name", ["loop", "trainer"])
def test_two_processes_measure_what_one_measures(folders, name):
    one, two = (read_reports(folder / f"{name}.jsonl") for folder in folders)
    assert len(one) == 4 + 4 + 3 + 3  # fisher and hutchinson at four steps, the others at three
    for alone, together in zip(
        *(sorted(reports, key=lambda r: (r.step, r.estimator)) for reports in (one, two)), strict=True
    ):
        assert (together.step, together.estimator, together.samples, together.batches) == (
            alone.step, alone.estimator, alone.samples, alone.batches,
        )  # fmt: skip
        for block, found in alone.items():
            assert together[block].mean == pytest.approx(found.mean, rel=1e-4, abs=1e-9), (
                alone.estimator,
                block,
            )
            assert together[block].stderr == pytest.approx(found.stderr, rel=1e-4, abs=1e-9, nan_ok=True)


def test_a_batch_of_fewer_rows_than_processes_is_refused():
    with pytest.raises(
        ValueError, match="a batch of 1 rows cannot be shared by 2 processes: give larger batches"
    ):
        _share({"input_ids": torch.zeros(1, 4)}, rank=0, world=2)


def test_a_batch_that_has_no_rows_is_refused():
    with pytest.raises(TypeError, match="a batch holds a str, which 2 processes cannot share by rows"):
        _share({"text": "words"}, rank=0, world=2)


def test_every_row_goes_to_one_process():
    batch = ({"ids": torch.arange(10).reshape(5, 2), "flag": True, "scale": None}, torch.arange(5))
    shares = [_share(batch, rank, world=2) for rank in range(2)]
    assert torch.equal(torch.cat([share[0]["ids"] for share in shares]), batch[0]["ids"])
    assert torch.equal(torch.cat([share[1] for share in shares]), batch[1])
    assert all(share[0]["flag"] is True and share[0]["scale"] is None for share in shares)
