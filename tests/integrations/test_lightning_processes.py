"""Lightning on two processes, and as the package pytorch_lightning."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from blockwise_lr.sharpness.monitor import read_reports
from support.processes import run_python, run_ranks

pytest.importorskip("lightning")
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("lightning_training.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    runpy.run_path(str(SCRIPT))["run"](one)
    done = run_ranks(SCRIPT, two, processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    return one, two


@pytest.mark.parametrize("name", ["whole", "resumed"])
def test_two_processes_train_as_one_does(name, folders):
    one, two = (torch.load(folder / f"{name}.pt") for folder in folders)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_ends_as_an_uninterrupted_one_to_the_bit(processes, folders):
    whole, resumed = (torch.load(folders[processes - 1] / f"{name}.pt") for name in ("whole", "resumed"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_two_processes_measure_what_one_measures(folders):
    one, two = (read_reports(folder / "whole" / "sharpness.jsonl") for folder in folders)
    assert len(one) == 5 + 5 + 4 + 4  # fisher and hutchinson at five steps, the others at four
    ordered = (sorted(reports, key=lambda r: (r.step, r.estimator)) for reports in (one, two))
    for alone, together in zip(*ordered, strict=True):
        assert (together.step, together.estimator, together.samples) == (
            alone.step, alone.estimator, alone.samples,
        )  # fmt: skip
        for block, found in alone.items():
            assert together[block].mean == pytest.approx(found.mean, rel=1e-3, abs=1e-9)


def test_the_first_process_alone_logs(folders):
    one, two = (
        (folder / "whole/lightning_logs/version_0/metrics.csv").read_text().splitlines() for folder in folders
    )
    assert set(one[0].split(",")) == set(two[0].split(","))
    assert {"lr-AdamW/emb", "lr/emb", "ratio/emb", "sharpness/fisher/emb"} <= set(two[0].split(","))
    assert len(one) == len(two)


def test_a_model_sharded_by_fully_shard_trains_and_is_measured_as_a_whole_one(tmp_path):
    script = SCRIPT.with_name("lightning_sharded.py")
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    runpy.run_path(str(script))["run"](one)
    done = run_ranks(script, two, processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    alone, together = (torch.load(folder / "sharded.pt") for folder in (one, two))
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-6)
    reports = [read_reports(folder / "sharpness.jsonl") for folder in (one, two)]
    assert [report.step for report in reports[0]] == [0, 1, 2, 3]
    for whole, sharded in zip(*reports, strict=True):
        assert sharded.step == whole.step
        for block, found in whole.items():
            assert sharded[block].mean == pytest.approx(found.mean, rel=1e-3, abs=1e-9)


PYTORCH_LIGHTNING = """
import sys
sys.modules["lightning"] = None  # as if it was not installed
import runpy, torch, pytorch_lightning as pl
from torch.utils.data import DataLoader
from blockwise_lr.integrations.lightning import BlockMonitor, configure_optimizers_by_block
from blockwise_lr.sharpness.monitor import read_reports
from support import tiny_models
assert issubclass(BlockMonitor, pl.Callback)
class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = tiny_models.gpt2(split=True)
    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss
    def configure_optimizers(self):
        return configure_optimizers_by_block(self, 1e-3)
ids = torch.arange(12).repeat(2, 1)
batch = {"input_ids": ids, "labels": ids}
trainer = pl.Trainer(
    max_steps=2, accelerator="cpu", log_every_n_steps=1, enable_checkpointing=False,
    callbacks=[BlockMonitor([batch], every=1), pl.callbacks.LearningRateMonitor()],
    logger=pl.loggers.CSVLogger(".", version=0),
)
trainer.fit(Module(), DataLoader([{"input_ids": row, "labels": row} for row in ids.repeat(4, 1)], batch_size=2))
print([report.step for report in read_reports("lightning_logs/version_0/sharpness.jsonl")])
print("lr-AdamW/emb" in open("lightning_logs/version_0/metrics.csv").readline())
"""


def test_the_package_pytorch_lightning_alone_does(tmp_path):
    pytest.importorskip("pytorch_lightning")
    done = run_python("-c", PYTORCH_LIGHTNING, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-2:] == ["[0, 1, 2]", "True"]
