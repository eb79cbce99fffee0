"""Score the trained models on the tasks, on code, and on code after a short fine-tuning.

    python studies/2026-11-downstream/items.py --text TEXT.jsonl --out runs/downstream
    python studies/2026-11-downstream/score.py --text TEXT.jsonl --out runs/downstream

Writes data/scores/NAME.json, once a model. --export also writes every model as a Hugging Face folder, for
lm-evaluation-harness, to OUT/models.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).parents[1] / "_support"))

import fine_tuning
from arms import Arm
from items import TASKS, Item, digest, read
from plan import HORIZON, SEEDS, models
from run import OUT, RESULTS, weights_of
from shapes import CONTEXT, VOCABULARY, build
from stacked import Text
from text_runs import load

from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import prepare_data
from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.allocator import keep_freed_memory
from blockwise_lr.train.environment import describe_environment

SCORES = RESULTS.parent / "scores"
ROWS = 32  # sequences at once


def encoded(tokenizer: PreTrainedTokenizerFast, prompt: str, continuation: str) -> tuple[list[int], int]:
    """Return the tokens of prompt and continuation, and how many of them are the continuation's.

    This is the rule of lm-evaluation-harness: both are encoded together, and the continuation is what follows as many
    tokens as the prompt has alone. An empty prompt is one end-of-text token.
    """
    whole = tokenizer.encode(prompt + continuation, add_special_tokens=False)
    before = len(tokenizer.encode(prompt, add_special_tokens=False)) if prompt else 0
    count = len(whole) - before
    return (whole if prompt else [int(tokenizer.eos_token_id), *whole])[-(CONTEXT + 1) :], count


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, str]]
) -> list[tuple[float, bool]]:
    """Return, for each (prompt, continuation), the continuation's log-likelihood and whether it is the greedy one."""
    rows = [encoded(tokenizer, *text) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    found: dict[int, tuple[float, bool]] = {}
    for begin in range(0, len(order), ROWS):
        chosen = order[begin : begin + ROWS]
        longest = max(len(rows[i][0]) for i in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        for row, i in enumerate(chosen):
            ids[row, : len(rows[i][0])] = torch.tensor(rows[i][0])
        # The attention is causal, so what follows a sequence does not change it.
        logits: Tensor = model(input_ids=ids[:, :-1]).logits.float().log_softmax(-1)
        for row, i in enumerate(chosen):
            tokens, count = rows[i]
            ahead = torch.tensor(tokens[-count:])
            at = logits[row, len(tokens) - 1 - count : len(tokens) - 1]
            value = float(at.gather(1, ahead[:, None]).sum())
            found[i] = value, bool((at.argmax(-1) == ahead).all())
    return [found[i] for i in range(len(rows))]


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]
) -> dict[str, Any]:
    """Return which items a model has right, one character an item, and the log-likelihood of every cloze.

    `acc` takes the choice of the highest log-likelihood, `acc_norm` that of the highest over its number of characters;
    a cloze is right if its target is what the model would write. All three are the harness's.
    """
    if "target" in items[0]:
        found = log_likelihoods(model, tokenizer, [(item["prompt"], item["target"]) for item in items])
        right = "".join("01"[greedy] for _, greedy in found)
        return {"acc": right, "log_likelihood": [round(value, 3) for value, _ in found]}
    flat = [(item["prompt"], choice) for item in items for choice in item["choices"]]
    values = iter(value for value, _ in log_likelihoods(model, tokenizer, flat))
    kept = {"acc": "", "acc_norm": ""}
    for item in items:
        own = np.array([next(values) for _ in item["choices"]])
        lengths = np.array([len(choice) for choice in item["choices"]])
        kept["acc"] += "01"[int(own.argmax()) == item["answer"]]
        kept["acc_norm"] += "01"[int((own / lengths).argmax()) == item["answer"]]
    return kept


def trained(arm: Arm, out: Path) -> PreTrainedModel:
    """Return the model that a run ended with."""
    model = build(arm.shape, seed=arm.seed)
    weights = load_file(weights_of(arm, out))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])
    return model.eval()


def scored(
    arm: Arm,
    out: Path,
    tokenizer: PreTrainedTokenizerFast,
    tasks: dict[str, list[Item]],
    code: Text,
    rate: Arm | None,
) -> dict[str, Any]:
    """Return everything that is measured of one model.

    Args:
        arm: the run that the model comes from.
        out: where the weights are.
        tokenizer: the text's.
        tasks: items by task.
        code: the windows of code.
        rate: the fine-tuning that was chosen at seed 0; None: choose it on this model.
    """
    weights = load_file(weights_of(arm, out))
    first = Arm(arm.shape, fine_tuning.STEPS, fine_tuning.FIRST_RATE, seed=arm.seed)
    tried: dict[str, dict[str, Any]] = {}
    if rate is None:
        rate, tried = fine_tuning.tuned(first, weights, code)
        ended = tried[rate.name]
    else:
        rate = replace(rate, seed=arm.seed)
        ended = fine_tuning.fine_tune(rate, weights, code)
    model = trained(arm, out)
    return {
        "arm": arm.to_dict(),
        "tasks": {
            task: {"items": digest(items), **score(model, tokenizer, items)} for task, items in tasks.items()
        },
        "code": {
            "windows": fine_tuning.digest(code),
            "val_loss": fine_tuning.loss_before(first, weights, code),
            "fine_tuned": ended,
            "rates_tried": {run["arm"]["base_lr"]: run["tune_loss"] for run in tried.values()},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="the text that the models train on")
    parser.add_argument("--out", type=Path, default=OUT, help="the models' weights and the tasks")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the runs; scores go beside them")
    parser.add_argument("--cache", type=Path, help="the tokens of the text, if not in OUT/cache")
    parser.add_argument("--export", action="store_true", help="write the models for lm-evaluation-harness")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if not (arguments.out / "tasks").exists():
        parser.error(
            f"{arguments.out / 'tasks'} is missing: make the tasks first, by items.py with the same --out"
        )
    data = prepare_data(
        DataConfig(data=str(arguments.text), cache=str(arguments.cache or arguments.out / "cache")),
        vocab_size=VOCABULARY,
        context=CONTEXT,
        progress=False,
    )
    assert data.tokenizer is not None  # a text always has one
    tasks = {task: read(arguments.out / "tasks" / f"{task}.jsonl") for task in TASKS}
    sources = [path.read_text(encoding="utf-8") for path in fine_tuning.source_files()]
    code = fine_tuning.code_text(data.tokenizer, sources)
    folder = arguments.results.parent / SCORES.name
    folder.mkdir(parents=True, exist_ok=True)
    results = load(arguments.results)
    for name, first in models(results, load(HORIZON / "data" / "runs")).items():
        rate: Arm | None = None
        for seed in SEEDS:
            arm = replace(first, seed=seed)
            if not weights_of(arm, arguments.out).exists():
                print(f"{name}, seed {seed}: not trained yet; run run.py first", flush=True)
                break  # the rate is chosen at seed 0
            path = folder / f"{arm.name}.json"
            if not path.exists():
                found = scored(arm, arguments.out, data.tokenizer, tasks, code, rate)
                write_json_atomic(path, {**found, **describe_environment("cpu")})
                print(f"{name}, seed {seed}: scored", flush=True)
            if rate is None:
                rate = Arm(**load(folder).runs[arm.name]["code"]["fine_tuned"]["arm"])
            if arguments.export:
                export = arguments.out / "models" / arm.name
                trained(arm, arguments.out).save_pretrained(export)
                data.tokenizer.save_pretrained(export)


if __name__ == "__main__":
    main()
