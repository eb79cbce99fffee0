"""The command line as a newcomer meets it: what it prints, and its exit codes."""

import json
import re
import subprocess
import sys

import pytest

from blockwise_lr.train.presets import PRESETS
from support.commands import call, run_command


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_help_lists_the_commands(capsys, arguments):
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    for command in (
        "train PRESET",
        "compare PRESET",
        "tune PRESET",
        "eval RUN",
        "generate RUN",
        "sharpness MODEL",
        "inspect MODEL",
        "presets",
    ):
        assert command in out


@pytest.mark.parametrize("command", ["train", "compare", "tune"])
def test_help_of_a_preset_shows_its_values_and_units(capsys, command):
    code, out, _ = call(capsys, command, "llama-0.25b-minipile", "--help")
    assert code == 0
    for text in (
        "--base-lr",
        "--ratios",
        "--batch-size",
        "--save-every",
        "--device {auto,cpu,cuda}",
        "(default: 30000)",
    ):
        assert text in out
    assert "--preset" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trian"],
            "no command 'trian'; the commands are train, compare, tune, robustness, ablation, scaling, eval, generate, "
            "export, sharpness, inspect, presets",
        ),
        (["train"], "train needs the name of a preset first, such as: blockwise-lr train quickstart"),
        (
            ["train", "quikstart"],
            "no preset named 'quikstart'; there are quickstart, and gpt2-small, gpt2-medium",
        ),
        (["train", "no.json"], "cannot read the configuration no.json"),
        (
            ["train", "quickstart", "--stps", "3"],
            "Unrecognized options: --stps, 3 Perhaps you meant: --steps",
        ),
        (["train", "quickstart", "--steps", "many"], "Error parsing --steps: invalid literal for int()"),
        (["train", "quickstart", "--schedule", "linear"], "invalid choice 'linear'"),
        (
            ["compare", "quickstart", "--seed", "5"],
            "--seed 5 belongs to train; compare takes it as --seeds 0 1 2",
        ),
        (
            ["compare", "quickstart", "--ratios", "paper"],
            "--ratios paper belongs to train; compare takes it as --arms adamw:uniform adamw:paper",
        ),
        (
            ["compare", "quickstart", "--optimizer", "muon"],
            "--optimizer muon belongs to train; compare takes it as --arms muon:uniform muon:half",
        ),
        (["train", "quickstart", "--base-lr", "-1"], "--base-lr is -1.0; expected a finite number above 0"),
        (
            ["compare", "quickstart", "--arms", "adamw"],
            "cannot read the arm 'adamw': expected OPTIMIZER:RATIOS",
        ),
        (["tune", "quickstart", "--trials", "2"], "--trials is 2; expected 5 or more"),
        (
            ["tune", "quickstart", "--proxy", "big"],
            "--proxy is 'big'; expected WIDTHxLAYERS such as 128x4, auto, or none",
        ),
        (["tune", "quickstart", "--sampler", "grid"], "invalid choice 'grid'"),
        (["eval", "nowhere"], "no folder nowhere: expected a run's folder"),
        (["presets", "all"], "presets takes no arguments"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert err.startswith("blockwise-lr: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds list; expected an object of fields"),
        ('{"stepz": 1}', "no field named stepz; the fields are preset, steps"),
        ('{"steps": "many"}', "steps is 'many'; expected int"),
        ('{"optim": {"schedule": "linear"}}', "optim.schedule is 'linear'; expected 'cosine' or 'wsd'"),
        ('{"optim": 3}', "optim is 3; expected an object of fields"),
        ('{"model": {"kv_heads": 1.5}}', "model.kv_heads is 1.5; expected int | None"),
        ("{", "cannot read the configuration"),
        ('{"train": 3}', 'has int as its "train"; expected an object of fields'),
    ],
)
def test_a_bad_configuration_file_is_refused_by_field(capsys, tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    code, _, err = call(capsys, "train", str(path))
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_every_preset_is_listed(capsys):
    code, out, _ = call(capsys, "presets")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(PRESETS)


def test_a_run_is_repeated_from_its_own_config_json_with_the_same_losses(tiny, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(tiny.to_dict()))
    first = run_command("train", tmp_path / "tiny.json", "--out", tmp_path / "a", "--steps", "8")
    assert first.returncode == 0, first.stderr
    assert "8 steps, val loss" in first.stdout
    again = run_command("train", tmp_path / "a" / "config.json", "--out", tmp_path / "b")
    assert again.returncode == 0, again.stderr
    a, b = ((tmp_path / run / "result.json").read_text() for run in "ab")
    assert json.loads(a)["terminal_val_loss"] == json.loads(b)["terminal_val_loss"]
    evaluated = run_command("eval", tmp_path / "a", "--json")
    assert json.loads(evaluated.stdout)["val_loss"] == pytest.approx(
        json.loads(a)["terminal_val_loss"], abs=1e-4
    )


def test_a_diverged_run_is_one_line_and_exit_code_1(tiny, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(tiny.to_dict()))
    done = run_command(
        "train", tmp_path / "tiny.json", "--out", tmp_path / "run", "--base-lr", "1e30", "--weight-decay", "0"
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"blockwise-lr: the (loss|gradient) was no longer finite at step", last)
    assert "Traceback" not in done.stderr


def test_inspect_reads_well_and_gives_json(capsys):
    code, out, _ = call(capsys, "inspect", "gpt2-small")
    assert code == 0
    assert "124,475,904" in out
    code, out, _ = call(capsys, "inspect", "llama-134m", "--json")
    content = json.loads(out)
    assert content["blocks"]["head"] == 768 * 50_304
    assert content["parameters"]["model.norm.weight"]["block"] == "norm"
    assert all(p["reason"] for p in content["parameters"].values())


def printed(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


class TestImport:
    def test_the_core_imports_neither_transformers_nor_matplotlib_nor_datasets(self):
        heavy = {"transformers", "matplotlib", "datasets", "tyro", "rich", "scipy", "jinja2"}
        assert (
            printed(f"import sys; from blockwise_lr import *; print(sorted({heavy} & set(sys.modules)))")
            == "[]\n"
        )
