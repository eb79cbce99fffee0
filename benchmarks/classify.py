"""Seconds that `classify` and `split_fused` take on deep models, and `inspect` on large ones, on the meta device.

    python benchmarks/classify.py

Models of 1 000 layers, by transformers' classes; the best of REPEATS in CPU seconds of this process, which other work
on the machine lengthens less than wall-clock time. Of `blockwise-lr inspect` on the configuration of a LLaMA of 70B
parameters: CPU seconds and peak memory of the whole command, and of the same with one narrow layer, which is the time
to import. Writes benchmarks/results/classify.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _measure import usage_of
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from blockwise_lr.blocks import classify, split_fused
from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.environment import describe_environment

RESULTS = Path(__file__).parent / "results" / "classify.json"
REPEATS = 3
LAYERS = 1000
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28_672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128_256,
}  # fmt: skip
ONE_LAYER = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    found: dict[str, Any] = {}
    with torch.device("meta"):
        models = {
            "llama": LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS)),
            "gpt2": GPT2LMHeadModel(GPT2Config(n_layer=LAYERS)),
            "bert": BertForMaskedLM(BertConfig(num_hidden_layers=LAYERS)),
            "deepseek_v3, 200 layers": DeepseekV3ForCausalLM(DeepseekV3Config(num_hidden_layers=200)),
        }
    for name, model in models.items():
        found[name] = {
            "classify": best(partial(classify, model)),
            "parameters": len(list(model.parameters())),
        }
        found[name]["split_fused"] = best(partial(split_fused, model), 1)
        found[name]["classify, split"] = best(partial(classify, model))
        print(name, found[name], flush=True)
    inspected = inspect({"70B": LLAMA_70B, "one narrow layer": {**LLAMA_70B, **ONE_LAYER}})
    print(inspected)
    about = {"command": "python benchmarks/classify.py", **describe_environment("cpu")}
    write_json_atomic(RESULTS, {**about, "cpu_seconds": found, "inspect": inspected})


def inspect(configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """CPU seconds and peak memory of the command for each configuration; the best of REPEATS."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in configs.items():
            path = Path(folder, "config.json")
            path.write_text(json.dumps(config))
            runs = [measured("inspect", str(path)) for _ in range(REPEATS)]
            found[name] = {key: min(run[key] for run in runs) for key in runs[0]}
    return found


def measured(*arguments: str) -> dict[str, float]:
    """Of one command in a process of its own."""
    seconds, peak = usage_of(sys.executable, "-m", "blockwise_lr", *arguments)
    return {"cpu_seconds": seconds, "peak_gib": peak}


def best(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The least CPU time of some calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return round(min(times), 3)


if __name__ == "__main__":
    main()
