"""Every wrong input is one line on stderr, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from datasets import config as datasets_config
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.train.config import ModelConfig, OptimConfig, TrainConfig
from blockwise_lr.train.run import train
from faults.bad_files import FILES
from faults.bad_inputs import Bad
from faults.bad_models import MODELS
from faults.bad_settings import SETTINGS
from support.commands import call

CASES = [*SETTINGS, *FILES, *MODELS]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text/, tiny.json on it, run/ (two checkpoints), plain/ and bert/ (Hugging Face folders): all as it should be."""
    folder = tmp_path_factory.mktemp("good")
    rng = random.Random(0)
    words = ["the", "of", "and", "government", "people", "states", "nation", "congress", "war", "peace"]
    (folder / "text").mkdir()
    for i in range(16):
        (folder / "text" / f"{i:02}.txt").write_text(" ".join(rng.choices(words, k=60)))
    config = TrainConfig(
        steps=4, batch_size=2, log_every=2, eval_every=0, save_every=2, eval_tokens=32, report_to="none",
        device="cpu", data=DataConfig(data="text"), optim=OptimConfig(base_lr=1e-2, warmup_fraction=0.25),
        model=ModelConfig("llama", hidden_size=8, layers=1, heads=2, vocab_size=300, context=16),
    )  # fmt: skip
    (folder / "tiny.json").write_text(json.dumps(config.to_dict()))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("BLOCKWISE_LR_CACHE", str(tmp_path_factory.mktemp("cache")))
        train(config, folder / "run")
        AutoModelForCausalLM.from_pretrained("run/checkpoint-4").save_pretrained("plain")
        AutoTokenizer.from_pretrained("run/checkpoint-4").save_pretrained("plain")
        small = BertConfig(
            vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
        BertForMaskedLM(small).save_pretrained("bert")
    return folder


@pytest.fixture
def here(
    good: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A copy of the good files, to be broken, as the working directory; no network."""
    folder = shutil.copytree(good, tmp_path / "here")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("BLOCKWISE_LR_CACHE", str(tmp_path_factory.getbasetemp() / "bad-cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    for name in ("mine", "raising", "raises", "syntax", "exits"):
        sys.modules.pop(name, None)


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Everything below a folder: the bytes of files, None for folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.what)
def test_it_is_one_line_and_leaves_nothing_behind(
    bad: Bad, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if bad.needs_no_gpu and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    if bad.make:
        bad.make()
    before = contents(here)
    code, out, err = call(capsys, *shlex.split(bad.command))
    assert (code, out) == (2, ""), err
    assert err.startswith("blockwise-lr: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert not [piece for piece in bad.says if piece not in err], err
    assert contents(here) == before


def test_the_good_files_are_good(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or every refusal would prove nothing."""
    for command in (
        "train tiny.json --out out",
        "train tiny.json --out run",
        "eval run",
        "eval plain --data text",
        "generate plain --tokens 3",
        "export run --out exported",
        "inspect plain",
        "sharpness run/checkpoint-4 --directional --batches 2",
    ):
        code, _, err = call(capsys, *shlex.split(command))
        assert code == 0, err


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({bad.what for bad in CASES}) == len(CASES) >= 60
    assert all(bad.says for bad in CASES)
