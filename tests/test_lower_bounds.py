"""The declared lower bounds of the dependencies, all at once: `make lower-bounds` installs and runs this."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from blockwise_lr import build_optimizer, param_groups, split_fused
from blockwise_lr.integrations.sharpness_callback import SharpnessCallback
from blockwise_lr.integrations.transformers import BlockwiseTrainer, blockwise_optimizer
from blockwise_lr.optimizers import OPTIMIZERS
from support.commands import run_command

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif("LOWER_BOUNDS" not in os.environ, reason="runs under `make lower-bounds`")
TINY = (
    "--layers 1 --hidden-size 16 --vocab-size 300 --context 16 --batch-size 2 --eval-tokens 64 --log-every 2 "
    "--save-every 2 --eval-every 0 --device cpu"
)


def llama() -> LlamaForCausalLM:
    config = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return split_fused(
        LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=2, max_position_embeddings=32))
    )


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(16)]


def arguments(folder: Path, **changed: object) -> TrainingArguments:
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1}
    return TrainingArguments(str(folder), use_cpu=True, report_to="none", **{**settings, **changed})


def test_the_lowest_declared_versions_are_what_is_installed():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from lower_bounds import lower_bounds
    finally:
        sys.path.pop(0)
    found = {name: importlib.metadata.version(name) for name in lower_bounds()}
    wanted = lower_bounds()
    assert {name: version.split(".")[: wanted[name].count(".") + 1] for name, version in found.items()} == {
        name: version.split(".") for name, version in wanted.items()
    }


@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_trainer_trains_and_resumes(tmp_path, clip):
    batches = [{name: value[None] for name, value in row.items()} for row in rows()[:2]]
    for resume in (False, True):
        callback = SharpnessCallback(batches, every=2, path=tmp_path / "sharpness.jsonl")
        trainer = BlockwiseTrainer(
            llama(), arguments(tmp_path), train_dataset=rows(), clip_by_block=clip, callbacks=[callback]
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        assert trainer.state.global_step == 4
    assert (tmp_path / "sharpness.jsonl").read_text()


def test_a_plain_trainer_takes_the_groups(tmp_path):
    from transformers import Trainer

    model = llama()
    made = blockwise_optimizer(model, lr=1e-3, ratios="measured")
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), optimizer_cls_and_kwargs=made)
    trainer.train()
    assert {group["block"] for group in trainer.optimizer.param_groups} >= {"emb", "qk", "norm"}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sophia"])
def test_every_optimizer_steps(name):
    model = llama()
    optimizer = build_optimizer(name, model, 1e-3)
    for row in rows()[:3]:
        model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert param_groups(model, 1e-3)


def test_the_commands_train_compare_and_report(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKWISE_LR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.jsonl").write_text(
        "".join(
            json.dumps({"text": f"{i} the people of the states and the nation " * 40}) + "\n"
            for i in range(40)
        )
    )
    tiny = [*TINY.split(), "--data", str(tmp_path / "text.jsonl")]
    run = run_command("train", "quickstart", *tiny, "--steps", "4", "--out", tmp_path / "run")
    assert run.returncode == 0, run.stderr
    grid = ["--base-lrs", "1e-3", "2e-3", "--arms", "adamw:uniform", "adamw:paper", "--report-to", "none"]
    compared = run_command("compare", "quickstart", *tiny, *grid, "--steps", "4", "--out", tmp_path / "out")
    assert compared.returncode == 0, compared.stderr
    for name in ("report.md", "report.html", "compare.json", "learning_rates.png", "tuning.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    sharp = run_command(
        "sharpness", tmp_path / "run", "--batches", "2", "--out", tmp_path / "sharp", "--device", "cpu"
    )
    assert sharp.returncode == 0, sharp.stderr
    assert (tmp_path / "sharp" / "sharpness.png").exists()


def test_lightning_trains_and_resumes(tmp_path):
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader

    from blockwise_lr.integrations.lightning import BlockMonitor, configure_optimizers_by_block

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def training_step(self, batch, _):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return configure_optimizers_by_block(self, 1e-3)

    batches = [{name: value[None] for name, value in row.items()} for row in rows()[:2]]
    for resume in (None, tmp_path / "step=2.ckpt"):
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = Trainer(
            max_steps=4,
            accelerator="cpu",
            log_every_n_steps=1,
            logger=CSVLogger(tmp_path / str(resume is None)),
            callbacks=[BlockMonitor(batches, every=2), LearningRateMonitor(), saving],
        )
        trainer.fit(Module(), DataLoader(rows(), batch_size=2), ckpt_path=resume)
        assert trainer.global_step == 4
        assert "lr-AdamW/emb" in next((tmp_path / str(resume is None)).rglob("metrics.csv")).read_text()
