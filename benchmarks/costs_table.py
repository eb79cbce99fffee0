"""Write benchmarks/README.md: what each cost script measured last, from results/.

python benchmarks/costs_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
}
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
- [gpu.sh](gpu.sh) and [gpu_checks.py](gpu_checks.py) hold the checks for a GPU. Only those of
  sharpness have [results](results/gpu_checks-sharpness-2026-11-27.json).
"""


def latest(results: Path, script: str) -> dict[str, Any]:
    """The newest result of a script; the date is in the file's name."""
    found: dict[str, Any] = json.loads(max(results.glob(f"{script}-20*.json")).read_text(encoding="utf-8"))
    return found


def page(results: Path) -> str:
    """README.md, from the files in `results`."""
    lines = ["| script | what is measured | result | target | met | date |", "| --- " * 6 + "|"]
    for script, shown in SHOWN.items():
        found = latest(results, script)
        for name, words in shown.items():
            ratio = found["ratios"][name]
            met = {True: "yes", False: "no", None: ""}[ratio["met"]]
            lines.append(
                row(
                    script,
                    words,
                    spread(ratio),
                    (ratio["target"] or "").replace("<=", "≤").replace(">=", "≥"),
                    met,
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
    return HEAD + "\n".join(lines) + "\n" + TAIL


def row(script: str, words: str, result: str, target: str, met: str, date: str) -> str:
    return f"| [{script}]({script}.py) | {words} | {result} | {target} | {met} | {date[:10]} |"


def spread(ratio: dict[str, Any]) -> str:
    """The median, with the smallest and largest value where they differ."""
    middle, low, high = (f"{ratio[key]:.3g}" for key in ("median", "min", "max"))
    return middle if low == high else f"{middle} ({low} to {high})"


if __name__ == "__main__":
    write_text_atomic(HERE / "README.md", page(HERE / "results"))
