"""A checkpoint in lm-evaluation-harness: taken as it is, with the bits per byte that `eval` gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from blockwise_lr.train.run import train
from support.commands import call

pytest.importorskip("lm_eval", reason="needs lm_eval, which brings forty packages: pip install lm_eval")
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_harness_finds_the_bits_per_byte_of_eval(family, tiny, tiny_gpt2, tmp_path, capsys):
    # Documents longer than the context of 16 tokens, so that the windows are the same too.
    config = replace(tiny if family == "llama" else tiny_gpt2, save_every=0)
    train(config, tmp_path / "run")
    text = ROOT / "examples" / "lm_eval" / "speeches.jsonl"
    code, out, err = call(capsys, "eval", tmp_path / "run", "--data", text, "--json")
    assert code == 0, err
    ours = json.loads(out)

    arguments = f"pretrained={tmp_path / 'run' / f'checkpoint-{config.steps}'},dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--device", "cpu"]
    command += [
        "--tasks",
        "speeches",
        "--include_path",
        "examples/lm_eval",
        "--output_path",
        str(tmp_path / "found"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "found").rglob("results*.json")
    theirs = json.loads(path.read_text())["results"]["speeches"]
    assert theirs["bits_per_byte,none"] == pytest.approx(ours["bits_per_byte"], rel=1e-6)
    assert ours["documents"] == 4
    assert ours["tokens"] > 4 * config.model.context
