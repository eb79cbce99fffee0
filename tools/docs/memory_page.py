"""docs/reference/memory.md, out of the results of benchmarks/memory.py: `python tools/docs/memory_page.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockwise_lr.files import write_text_atomic

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reference" / "memory.md"


@dataclass(frozen=True)
class Model:
    """A LLaMA: its parameters, layers, width and vocabulary."""

    name: str
    parameters: float
    layers: int
    width: int
    vocabulary: int = 32_000


MODELS = (Model("1B", 1e9, 22, 2048), Model("7B", 7e9, 32, 4096), Model("70B", 70e9, 80, 8192))
CARDS = {"1B": 8, "7B": 8, "70B": 64}
WINDOW = 4096
ADAM_MINI = "state, GPT-2 small: adam-mini / adamw"
ACTIVATIONS = "activations with checkpointing: measure_sharpness / training step"
CALLS = {
    "measure_directional, fp32": "`measure_directional`",
    "measure_directional, bf16": "`measure_directional`, bf16 weights",
    "measure_sharpness, fp32": "`measure_sharpness`",
    "AutoRatios, fp32": "a step in which `AutoRatios` measures",
    "AdamMini.step, fp32": "`AdamMini.step`",
    "AdamMini.step, bf16": "`AdamMini.step`, bf16 weights",
}
HEAD = """\
# How much memory does it take?

**Blockwise learning rates need no extra memory: training needs what AdamW needs. Adam-mini saves a
quarter of it. A measurement needs extra memory while it runs**, as the second table shows.

All numbers are GB (10^9 bytes). "One card" holds the whole model. Under FSDP2, every card holds its
share. Activations come on top and have a table of their own.

## While training

Weights, gradients and optimizer states are in fp32, and the passes run under bf16 autocast, as in
`blockwise-lr train`. With bf16 weights, gradients and states, each row is half as large.

"""
MIDDLE = """
## Extra during a measurement

The extra is the peak during the call, above what was allocated before it: parameters, gradients and
states. So a card needs the total above, and this extra. If a measurement runs after
`optimizer.zero_grad()`, the memory of the gradients is free for it.

"""
ACTIVATIONS_HEAD = """
## Activations

Activations grow with the tokens in a batch and not with the number of cards. The table is computed,
for one window of {window} tokens with gradient checkpointing, which keeps the input of each layer:

"""
TAIL = """
With gradient checkpointing, `measure_sharpness` took {times:.3g} times the activations that a
training step took.

## Limits

- The bytes a parameter of a measurement are measured on {device} ([script](../../benchmarks/memory.py),
  {date}). The model is a LLaMA of {parameters:.0f}M parameters whose blocks have the shares of LLaMA-7B's.
  Larger models are computed from it.
- The states of Adam-mini are measured on GPT-2 small ([script](../../benchmarks/optimizers.py)).
- For FSDP2, the table assumes that a share of a parameter takes its share of the memory. This is
  not measured. On sharded parameters, `measure_sharpness` and `measure_directional` compute all
  gradients of a shard at once, so they take about 4 bytes more for each element of the shard.
- Under DDP, and with `accumulate` above 1, `measure_sharpness` keeps all gradients, so it takes about
  4 bytes a parameter.
- Fragmentation and the libraries' own buffers are left out. Allow for some GB a card.

`python tools/docs/memory_page.py` makes this page from the
[results](../../benchmarks/results).
"""


def latest(results: Path, script: str) -> dict[str, Any]:
    """Return the newest result of a benchmark."""
    path = max(results.glob(f"{script}-20*.json"))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def page(results: Path) -> str:
    """Return the page, from the files in `results`."""
    memory, optimizers = latest(results, "memory"), latest(results, "optimizers")
    states = 8 * optimizers["ratios"][ADAM_MINI]["median"]
    held = {
        "parameters": 4.0,
        "gradients": 4.0,
        "states of AdamW": 8.0,
        "states of Adam-mini": states,
        "total with AdamW": 16.0,
        "total with Adam-mini": 8 + states,
    }
    extra = {
        words: memory["measurements"]["extra bytes a parameter"][call][0] for call, words in CALLS.items()
    }
    hardware = memory["hardware"]
    return "".join(
        [
            HEAD,
            table(held),
            row("FSDP2: gathered layers", "", ["", "", "", *(gathered(model) for model in MODELS)]),
            "\nFSDP2 gathers the parameters of two layers and keeps the gradient of one, in fp32.\n",
            MIDDLE,
            table(extra),
            ACTIVATIONS_HEAD.format(window=f"{WINDOW:,}".replace(",", " ")),
            activations(),
            TAIL.format(
                times=memory["ratios"][ACTIVATIONS]["median"],
                device="the CPU" if hardware["device"] == "cpu" else hardware["gpu"],
                parameters=memory["settings"]["parameters"] / 1e6,
                date=memory["date"][:10],
            ),
        ]
    )


def table(bytes_each: dict[str, float]) -> str:
    """Return a table in GB, from bytes a parameter."""
    shared = [f"{model.name} on {CARDS[model.name]} cards" for model in MODELS]
    names = ["", "bytes a parameter", *(f"{model.name}, one card" for model in MODELS), *shared]
    lines = ["| " + " | ".join(names) + " |\n", "| --- " * len(names) + "|\n"]
    for words, each in bytes_each.items():
        whole = [each * model.parameters for model in MODELS]
        parts = [each * model.parameters / CARDS[model.name] for model in MODELS]
        lines.append(
            row(
                words,
                f"{each:.2g}" if each >= 0.01 else "< 0.01",
                [gigabytes(size) for size in whole + parts],
            )
        )
    return "".join(lines)


def activations() -> str:
    """Return the table of activations with gradient checkpointing."""
    lines = ["| | 1B | 7B | 70B |\n", "| --- | --- | --- | --- |\n"]
    inputs = [gigabytes(4 * WINDOW * model.layers * model.width) for model in MODELS]
    logits = [gigabytes(4 * WINDOW * model.vocabulary) for model in MODELS]
    for words, cells in {"inputs of the layers, fp32": inputs, "logits, each copy in fp32": logits}.items():
        lines.append("| " + " | ".join([words, *cells]) + " |\n")
    return "".join(lines)


def gathered(model: Model) -> str:
    """Return the size of two layers' parameters and one layer's gradient."""
    return gigabytes(3 * 4 * model.parameters / model.layers)


def row(words: str, each: str, cells: list[str]) -> str:
    """Return a line of a table."""
    return "| " + " | ".join([words, each, *cells]) + " |\n"


def gigabytes(size: float) -> str:
    """Return a size in GB, with three digits, or two where it is below 10."""
    size /= 1e9
    if size < 0.01:
        return "< 0.01"
    if size >= 1000:
        return f"{size:,.0f}".replace(",", " ")
    return f"{size:.3g}" if size >= 10 else f"{size:.2g}"


if __name__ == "__main__":
    write_text_atomic(PAGE, page(RESULTS))
