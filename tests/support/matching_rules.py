"""The rules by which other trainers match parameters, applied literally to exported text."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable
from typing import Any

import yaml
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

Found = dict[str, tuple[float, float]]
"""The learning rate and the weight decay of each parameter."""

NORMS_AND_BIASES = r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)"
"""transformers 5.23, Trainer.get_decay_parameter_names."""


def executed(text: str, **names: Any) -> dict[str, Any]:
    """Run exported Python without its imports; `names` stand in for what they import."""
    body = "\n".join(line for line in text.splitlines() if not re.match(r"from |import ", line))
    namespace = {"re": re, **names}
    exec(compile(body, "exported", "exec"), namespace)
    return namespace


def torchtitan(text: str, names: Iterable[str]) -> Found:
    class Container:
        Config = dict

    made = executed(text, ParamGroupConfig=dict, OptimizersContainer=Container)["optimizer"]["param_groups"]
    free, found = list(names), {}
    for group in made:
        claimed = [name for name in free if re.search(group["pattern"], name)]
        assert claimed, f"pattern {group['pattern']} matched no parameters"
        settings = group["optimizer_kwargs"]
        assert settings.keys() == {"lr", "betas", "eps", "weight_decay"}
        found |= dict.fromkeys(claimed, (settings["lr"], settings["weight_decay"]))
        free = [name for name in free if name not in claimed]
    assert not free
    return found


def automodel(text: str, names: Iterable[str]) -> Found:
    optimizer = yaml.safe_load(text)["optimizer"]
    lr, decay = optimizer["lr"], optimizer["weight_decay"]
    found = {}
    for name in names:
        of = next((o for o in optimizer["param_group_overrides"] if re.search(o["pattern"], name)), {})
        found[name] = (lr * of.get("lr_mult", 1), decay * of.get("wd_mult", 1))
    return found


def megatron(text: str, names: Iterable[str]) -> Found:
    made = executed(text, ParamKey=lambda name: name, ParamGroupOverride=dict)
    decay = float(re.search(r"set --weight-decay ([\d.]+)\.", text)[1])
    found = {}
    for name in names:
        merged: dict[str, float] = {}
        for patterns, override in made["block_overrides"].items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                assert all(merged.get(key, value) == value for key, value in override.items()), "conflict"
                merged |= override
        found[name] = (merged["max_lr"], decay * merged["wd_mult"])
    return found


def olmo_core(text: str, names: Iterable[str]) -> Found:
    made = executed(text, AdamWConfig=dict, OptimGroupOverride=dict)["optim"]
    names = list(names)
    found: Found = {}
    for group in made["group_overrides"]:
        for pattern in group["params"]:
            matched = [name for name in names if fnmatch.fnmatch(name, pattern)]
            assert matched, f"{pattern} does not match any parameters"
            for name in matched:
                assert name not in found, "some parameters appear in more than one parameter group"
                found[name] = (group["opts"]["lr"], group["opts"]["weight_decay"])
    return dict.fromkeys(names, (made["lr"], made["weight_decay"])) | found


def fairseq2(text: str, names: Iterable[str]) -> Found:
    config = yaml.safe_load(text)["optimizer"]["config"]
    found = {}
    for name in names:
        group = next(
            (g for g in config["groups"] if any(name == p or re.match(p, name) for p in g["params"])), config
        )
        found[name] = (group["lr"], group["weight_decay"])
    return found


def timm(text: str, names: Iterable[str]) -> Found:
    made = executed(text)
    found = {}
    for name in names:
        (group,) = [group for group in made["GROUPS"] if re.search(group[1], name)]
        found[name] = (group[2] * made["LR"], group[3])
    return found


optax = timm


def axolotl(text: str, model: nn.Module) -> Found:
    """axolotl 0.19.0, core/trainers/mixins/optimizer.py, create_optimizer_grouped_parameters."""
    config = yaml.safe_load(text)
    decayed = get_parameter_names(model, [nn.LayerNorm], [NORMS_AND_BIASES])
    group_of = {module: group for group in config["lr_groups"] for module in group["modules"]}
    found = {}
    for name, _ in model.named_parameters():
        saved = name.endswith("modules_to_save.default.weight")
        if saved or any(each in name for each in ("embed_tokens", "lm_head")):
            found[name] = (config.get("embedding_lr") or config["learning_rate"], 0.0)
        elif name in decayed:
            group = next((group_of[module] for module in group_of if module in name), None)
            found[name] = (group["lr"] if group else config["learning_rate"], config["weight_decay"])
        else:
            found[name] = (config["learning_rate"], 0.0)
    return found


def nanochat(text: str, width: int) -> dict[str, float]:
    """nanochat at 92d63d4, nanochat/gpt.py, setup_optimizer: the rates of the groups that have flags or follow one."""
    words = text.splitlines()[-1].split()
    flags = dict(zip(words[::2], map(float, words[1::2]), strict=True))
    assert flags.keys() == {"--embedding-lr", "--unembedding-lr"}
    scale = (width / 768) ** -0.5
    embedding = flags["--embedding-lr"]
    return {
        "lm_head": flags["--unembedding-lr"] * scale,
        "transformer.wte": embedding * scale,
        "value_embeds": embedding * scale * 0.5,
    }


def plain_json(text: str, names: Iterable[str]) -> Found:
    groups = json.loads(text)["groups"]
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["parameters"]}


RULES = {
    "torchtitan": torchtitan,
    "automodel": automodel,
    "megatron": megatron,
    "olmo-core": olmo_core,
    "fairseq2": fairseq2,
    "timm": timm,
    "json": plain_json,
    "optax": optax,
}
"""The targets that express every block."""
