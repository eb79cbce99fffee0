"""Write benchmarks/README.md: what each cost script measured last, from results/.

python benchmarks/costs_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from gpu.parts import PARTS, plan

from blockwise_lr.files import write_text_atomic

HERE = Path(__file__).parent
# Of each script: which of its ratios the table shows, and in which words.
SHOWN = {
    "optimizer_step": {
        "blockwise / one group, split": "AdamW step of GPT-2 small, groups by block over one group, QKV split",
        "blockwise / one group, unsplit": "AdamW step of GPT-2 small, groups by block over one group, QKV fused",
    },
    "split_forward": {
        "fp32: split / unsplit": "forward and backward of GPT-2 small, split over unsplit, fp32",
        "bf16: split / unsplit": "forward and backward of GPT-2 small, split over unsplit, bf16",
    },
    "optimizers": {
        "step, GPT-2 small: adam-mini, compiled / adamw": "Adam-mini's compiled step over AdamW's, GPT-2 small",
        "state, GPT-2 small: adam-mini / adamw": "Adam-mini's state over AdamW's, GPT-2 small",
    },
    "train_throughput": {
        "tokens/s: train / bare": "tokens/s of `train` over nanoGPT's loop",
        "tokens/s: train / bare, memory kept": "tokens/s of `train` over nanoGPT's loop, which keeps memory too",
        "tokens/s: train, compiled / bare, compiled": "tokens/s of `train` over nanoGPT's loop, both compiled",
        "peak memory: train / bare": "peak memory of `train` over nanoGPT's loop",
    },
    "train_parts": {
        "imports to first step / 10 s: text in the cache": "imports to first step over 10 s, text in the cache",
        "evaluation / training: quickstart": "time of evaluation over time of training, quickstart",
        "checkpoint / training: quickstart": "time of checkpoints over time of training, quickstart",
    },
    "compile_start": {
        "CPU time of compiling: layers / whole": (
            "CPU time of compiling GPT-2 small, `train --compile` over the whole model"
        ),
        "step: layers / whole": "forward and backward of GPT-2 small, `train --compile` over the whole model",
    },
    "sharpness": {
        "all blocks time: curvlinops GGN hutchinson / fisher": "time to 5 % error, curvlinops over ours (`fisher`)",
        "all blocks time: hutchinson / fisher": "time to 5 % error, `hutchinson` over `fisher`",
        "memory: fisher / forward and backward": "memory of `fisher` over forward and backward",
    },
    "sharpness_cost": {
        "GPT-2 small: fisher / forward and backward": "time of `fisher` over forward and backward, GPT-2 small",
        "GPT-2 small: empirical from its gradients / whole step": "time of `empirical` in training over a whole step",
    },
    "directional_cost": {
        "GPT-2 small: measure_directional / forward and backward": (
            "time of `measure_directional` over forward and backward, GPT-2 small"
        ),
    },
    "memory": {
        **{
            f"{call}: extra bytes / parameters": f"extra bytes a parameter of {words}"
            for call, words in {
                "measure_directional, fp32": "`measure_directional`, fp32",
                "measure_directional, bf16": "`measure_directional`, bf16",
                "AutoRatios, fp32": "a measurement of `AutoRatios`, fp32",
                "AdamMini.step, fp32": "Adam-mini's step, fp32",
                "AdamMini.step, bf16": "Adam-mini's step, bf16",
                "measure_sharpness, fp32": "`measure_sharpness`, fp32",
            }.items()
        },
        "activations with checkpointing: measure_sharpness / training step": (
            "activations of `measure_sharpness` over a training step's, with checkpointing"
        ),
    },
}
# Of each part of the GPU checks: the same. A part without a result is left out.
SHOWN_ON_GPU = {
    "costs": {
        "GPT-2: fisher / forward and backward": "time of `fisher` over forward and backward",
        "GPT-2: empirical / forward and backward": "time of `empirical` over forward and backward",
        "GPT-2: empirical from its gradients / whole step": SHOWN["sharpness_cost"][
            "GPT-2 small: empirical from its gradients / whole step"
        ],
        "GPT-2: clipping by block / clipping": "time of clipping by block over torch's clipping",
        "GPT-2: AdamMini / AdamW": "Adam-mini's step over fused AdamW's",
        "GPT-2: AutoRatios alone / step": "what `AutoRatios` adds to a step in which it measures, over the step",
        "GPT-2: measure_directional / forward and backward": (
            "time of `measure_directional` over forward and backward"
        ),
    },
    "throughput": {"tokens/s: train / bare": "tokens/s of `train` over a bare loop, the same compiled model"},
    "optimizers": {
        "step, GPT-2: adam-mini, compiled / adamw": "Adam-mini's compiled step over fused AdamW's"
    },
    "fsdp2": {"step: FSDP2 / plain": "a step of LLaMA-134M under FSDP2 on one card over a plain one"},
    "memory": SHOWN["memory"],
}
MET = {True: "yes", False: "no", None: ""}
EARLIER = {"costs": "gpu_checks-sharpness"}
"""Names of files that earlier versions of a part wrote."""
HEAD = """# Benchmarks: what a thing costs

Each script measures one cost in time or memory and writes a dated file to [results](results).
`make bench` runs them all. What blockwise rates are worth is in [studies](../studies/README.md).

The table shows the latest result of each script: the median of its repeats, with the smallest and
largest in brackets. "A over B" is the ratio A / B. Smaller is better, with three exceptions: for
tokens/s, for MB/s, and for the time to 5 % error of other methods over that of `fisher`, larger is
better. `fisher`, `empirical` and `hutchinson` are
[estimators of sharpness](../docs/concepts/sharpness.md#which-estimator).
[Costs](../docs/reference/costs.md) explains the results.

`python benchmarks/costs_table.py` makes this table, and a test compares it with the results.

"""
TAIL = """
- Each repeat measures both sides of a ratio in turn, on 2 CPU cores of a shared machine. The spread
  of the ratios shows how much the machine varies.
- Each file in [results](results) holds the command and the hardware, and every repeat where there
  are repeats.
- [memory](memory.py) counts the peak of a call above what was allocated before it.
  [Memory](../docs/reference/memory.md) computes from it what large models need.

## On a GPU

GPT-2 small, unless another model is named:

"""

GPU_TAIL = """
[gpu](gpu/__main__.py) holds checks for a GPU that is available for minutes only. They need no
installation beyond torch, transformers, accelerate, tokenizers and safetensors, what these depend
on, and three wheels in pure Python: tyro, docstring_parser and typeguard. They run from a fresh
clone, from any folder:

```
python benchmarks/gpu plan --seconds 600
python benchmarks/gpu run all --seconds 600 --data TOKENS    # TOKENS: train.bin and val.bin of nanoGPT
python benchmarks/gpu run all --device cpu --tiny            # tries every part without a GPU
bash benchmarks/gpu/stripped.sh                              # the same, with those packages alone
```

One process runs the parts in this order. A part writes its result as soon as it has a number, and
is cut off after 120 s. If a part fails, its error is in its file and the next part begins. Parts
that are done are skipped when the command is called again. This is what `plan` prints:

```
{plan}
```
"""


def latest(results: Path, script: str) -> dict[str, Any]:
    """The newest result of a script; the date is in the file's name."""
    found: dict[str, Any] = json.loads(max(results.glob(f"{script}-20*.json")).read_text(encoding="utf-8"))
    return found


def page(results: Path) -> str:
    """Return README.md, from the files in `results`."""
    lines = ["| script | what is measured | result | target | met | date |", "| --- " * 6 + "|"]
    for script, shown in SHOWN.items():
        found = latest(results, script)
        for name, words in shown.items():
            ratio = found["ratios"][name]
            lines.append(
                row(
                    script,
                    words,
                    spread(ratio),
                    target(ratio),
                    MET[ratio["met"]],
                    found["date"],
                )
            )
    found = json.loads((results / "classify.json").read_text(encoding="utf-8"))
    seconds = f"{found['cpu_seconds']['llama']['classify']:.2f} s"
    parameters = f"{found['cpu_seconds']['llama']['parameters']:,}"
    lines.append(
        row(
            "classify",
            f"CPU time of `classify`, LLaMA of {parameters} tensors",
            seconds,
            "",
            "",
            found["date"],
        )
    )
    lines.append(
        row(
            "classify",
            "CPU time of `inspect`, LLaMA of 70B",
            f"{found['inspect']['70B']['cpu_seconds']:.2f} s",
            "",
            "",
            found["date"],
        )
    )
    path = max(results.glob("tokenize-20*.json"))
    found, date = json.loads(path.read_text(encoding="utf-8")), path.stem.removeprefix("tokenize-")
    lines.append(row("tokenizing", "MB/s over `datasets.map`", spread(found["speed"]["ratio"]), "", "", date))
    largest = found["memory"][-1]
    words = f"peak memory while tokenizing {largest['text_mb']:.0f} MB"
    lines.append(row("tokenizing", words, f"{largest['peak_rss_mb']} MB", "", "", date))
    on_gpu = "\n".join(gpu_rows(results)) + "\n"
    return HEAD + "\n".join(lines) + "\n" + TAIL + on_gpu + GPU_TAIL.format(plan=plan(PARTS, 600))


def row(script: str, words: str, result: str, target: str, met: str, date: str) -> str:
    return f"| [{script}]({script}.py) | {words} | {result} | {target} | {met} | {date[:10]} |"


def gpu_rows(results: Path) -> list[str]:
    """Return the table of the newest result of each part of the GPU checks."""
    lines = ["| part | what is measured | result | target | met | card | date |", "| --- " * 7 + "|"]
    for part, shown in SHOWN_ON_GPU.items():
        paths = [*results.glob(f"gpu-{part}-20*.json")]
        if part in EARLIER:
            paths += results.glob(f"{EARLIER[part]}-20*.json")
        if not paths:
            continue
        found = max((json.loads(path.read_text(encoding="utf-8")) for path in paths), key=lambda f: f["date"])
        card = found["hardware"].get("gpu", "CPU").removeprefix("NVIDIA ")
        cells = {
            words: (spread(ratio), target(ratio), MET[ratio["met"]])
            for name, words in shown.items()
            if (ratio := found["ratios"].get(name)) is not None
        }
        for arm, values in found["measurements"].get("MFU", {}).items():
            cells[f"share of the card's peak (MFU), {arm}"] = (f"{median(values):.3g}", "", "")
        lines += [
            f"| {part} | {words} | {' | '.join(cell)} | {card} | {found['date'][:10]} |"
            for words, cell in cells.items()
        ]
    return lines


def target(ratio: dict[str, Any]) -> str:
    """Return the target of a ratio, with signs as in print."""
    return (ratio["target"] or "").replace("<=", "≤").replace(">=", "≥")


def spread(ratio: dict[str, Any]) -> str:
    """The median, with the smallest and largest value where they differ."""
    middle, low, high = (f"{ratio[key]:.3g}" for key in ("median", "min", "max"))
    return middle if low == high else f"{middle} ({low} to {high})"


if __name__ == "__main__":
    write_text_atomic(HERE / "README.md", page(HERE / "results"))
