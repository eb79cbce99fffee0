"""`blockwise-lr export MODEL --to TRAINER` prints configuration that the trainer's rule maps to the block map."""

from __future__ import annotations

import json

import pytest
import yaml

from blockwise_lr import param_groups
from blockwise_lr.analysis.meta_models import model_to_inspect
from blockwise_lr.cli.export import ExportCommand
from blockwise_lr.export import REFUSED, TARGETS
from support.commands import call
from support.matching_rules import RULES


def test_every_target_can_be_named():
    accepted = ExportCommand.__dataclass_fields__["to"].type
    assert all(f'"{target}"' in accepted or f"'{target}'" in accepted for target in (*TARGETS, *REFUSED))


def test_a_preset_is_exported_with_the_defaults_of_param_groups(capsys):
    code, out, err = call(capsys, "export", "quickstart", "--to", "json", "--lr", "6e-4")
    assert code == 0, err
    groups = param_groups(model_to_inspect("quickstart"), 6e-4)
    expected = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    found = RULES["json"](out, expected)
    assert found == {name: pytest.approx(values) for name, values in expected.items()}


def test_ratios_weight_decay_and_names_are_taken(capsys, tmp_path):
    (tmp_path / "ratios.json").write_text(json.dumps({"emb": 5}))
    given = ("--ratios", tmp_path / "ratios.json", "--weight-decay", "0.02", "--names", "model")
    code, out, err = call(capsys, "export", "quickstart", "--to", "fairseq2", "--lr", "1e-3", *given)
    assert code == 0, err
    config = yaml.safe_load(out)["optimizer"]["config"]
    (emb,) = [group for group in config["groups"] if "embed_tokens" in group["params"][0]]
    assert (emb["lr"], emb["weight_decay"], config["lr"]) == (0.005, 0.02, 0.001)


def test_overrides_of_blocks_are_taken(capsys):
    given = ("--ratios", "other=3", "--blocks", r"mlp\.down_proj=other")
    code, out, err = call(capsys, "export", "quickstart", "--to", "automodel", *given)
    assert code == 0, err
    (override,) = yaml.safe_load(out)["optimizer"]["param_group_overrides"]
    assert override == {"pattern": r"\.down_proj\.", "lr_mult": 3}


def test_a_file_is_written_and_what_is_lost_is_printed(capsys, tmp_path):
    out = tmp_path / "blocks.py"
    given = ("--lr", "1e-3", "--ratios", "emb=4,qk=2", "--out", out)
    code, printed, err = call(capsys, "export", "quickstart", "--to", "megatron", *given)
    assert (code, err) == (0, "")
    first, lost = printed.splitlines()
    assert first.startswith(
        f"{out}: learning rates by block for megatron, under the names of Megatron-core's"
    )
    assert lost.startswith("lost: decoder.layers.*.self_attention.linear_qkv.weight holds")
    compile(out.read_text(), str(out), "exec")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("quickstart", "export --to huggingface needs a folder to write: add --out DIR; to export learning"),
        ("quickstart --lr 1e-3 --ratios paper", "--lr and --ratios: for learning rates of another trainer"),
        (
            "quickstart --names model --out x",
            "--names: for learning rates of another trainer, and --to is hugging",
        ),
        ("quickstart --blocks foo=bar --out x", "--blocks: for learning rates of another trainer"),
        ("quickstart --trust-remote-code --out x", "another trainer, or leave out --trust-remote-code"),
        ("quickstart --to torchtitan", "torchtitan takes absolute learning rates"),
        ("quickstart --to torchtitan --lr 0", "--lr is 0.0; expected a finite number above 0"),
        ("quickstart --to json --weight-decay -1", "--weight-decay is -1.0; expected a finite number, 0 or"),
        ("quickstart --to json --ratios auto", "--ratios auto changes the ratios during the run"),
        ("quickstart --to json --ratios emb=4,foo=3", "--ratios: 'foo' is not a block"),
        ("quickstart --to json --blocks x", "--blocks 'x' is neither REGEX=BLOCK"),
        ("quickstart --to json --out .", ". is a folder; expected the name of a file: choose another --out"),
        (
            "quickstart --to json --out README.md/x",
            "README.md is no folder; expected a file in a folder that",
        ),
        (
            "quickstart --to json --out no/x",
            "--out no/x: no is no folder; expected a file in a folder that exists",
        ),
        ("quickstart --to litgpt", "LitGPT sets the rate of every group to one number"),
        ("quickstart --to onnx", "invalid choice 'onnx'"),
        ("no/such/folder --to json", "'no/such/folder' is no folder and no preset"),
        ("--to json", "Missing from blockwise-lr export: MODEL"),
    ],
)
def test_what_cannot_be_exported_is_one_line(capsys, arguments, message):
    code, out, err = call(capsys, "export", *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
