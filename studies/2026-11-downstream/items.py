"""Make the items of the tasks from text that no model has trained on, and their task files for lm-evaluation-harness.

    python studies/2026-11-downstream/items.py --text TEXT.jsonl --out runs/downstream

Three tasks, from the val and measure documents of the text that the models train on. An item is one JSON line. The
harness runs them without a network, on a model that score.py has exported:

    lm_eval --model hf --model_args pretrained=runs/downstream/models/NAME,dtype=float32 \\
            --tasks cloze,continuation,pairs --include_path runs/downstream/tasks --device cpu
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import split_modulus
from blockwise_lr.data.shards import split_of
from blockwise_lr.data.sources import open_source
from blockwise_lr.files import write_text_atomic

Item = dict[str, Any]
"""A cloze: {"prompt", "target"}. Any other task: {"prompt", "choices", "answer"}, the answer being an index."""

MOST = 1500
"""Items of a task; fewer where the text gives fewer."""

_SENTENCE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()/-]+\.")
_PROMPT, _ENDING = (60, 240), (30, 140)  # characters, so that an item fits a context of 128 tokens

SWAPS: Mapping[str, str] = {
    one: other
    for a, b in (
        ("is", "are"),
        ("has", "have"),
        ("was", "were"),
        ("does", "do"),
        ("this", "these"),
        ("a", "an"),
    )
    for one, other in ((a, b), (b, a))
}
"""Words that make a sentence ungrammatical, or rarely so, when they change places."""


def sentences(document: str) -> list[list[str]]:
    """Return the sentences of every paragraph that is plain prose, at least five words each."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", document):
        parts = re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(paragraph.split()))
        if all(_SENTENCE.fullmatch(part) and len(part.split()) >= 5 for part in parts):
            paragraphs.append(parts)
    return paragraphs


def cloze(documents: Sequence[str], rng: random.Random) -> Iterator[Item]:
    """Yield passages without their last word, which is the target, as in LAMBADA (arXiv 1606.06031)."""
    for document in documents:
        for parts in sentences(document):
            passage = _within(parts, _PROMPT[1])
            prompt, _, last = passage.rpartition(" ")
            if len(prompt) >= _PROMPT[0] and re.fullmatch(r"[a-z]{3,}\.", last):
                yield {"prompt": prompt, "target": f" {last[:-1]}"}


def continuation(documents: Sequence[str], rng: random.Random) -> Iterator[Item]:
    """Yield a passage with the sentence that follows it and three of other documents, of much the same length.

    The form is HellaSwag's (arXiv 1905.07830), but the wrong endings are not chosen by a model.
    """
    found = [(i, parts) for i, document in enumerate(documents) for parts in sentences(document)]
    endings = [(i, part) for i, parts in found for part in parts if _between(part, _ENDING)]
    for i, parts in found:
        for place in range(1, len(parts)):
            prompt, right = " ".join(parts[:place]), parts[place]
            if not (_between(prompt, _PROMPT) and _between(right, _ENDING)):
                continue
            near = {s for j, s in endings if j != i and abs(len(s) - len(right)) <= 0.15 * len(right)}
            near.discard(right)
            if len(near) >= 3:
                choices = [right, *rng.sample(sorted(near), 3)]
                rng.shuffle(choices)
                yield {
                    "prompt": prompt,
                    "choices": [f" {choice}" for choice in choices],
                    "answer": choices.index(right),
                }


def pairs(documents: Sequence[str], rng: random.Random) -> Iterator[Item]:
    """Yield a sentence and the same with one word of SWAPS exchanged, as in BLiMP (arXiv 1912.00582); no prompt."""
    for document in documents:
        for part in (part for parts in sentences(document) for part in parts if len(part) <= _PROMPT[1]):
            words = part.split(" ")
            places = [i for i, word in enumerate(words) if i and word in SWAPS]
            if places:
                place = rng.choice(places)
                wrong = " ".join([*words[:place], SWAPS[words[place]], *words[place + 1 :]])
                answer = rng.randrange(2)
                yield {
                    "prompt": "",
                    "choices": [wrong, part] if answer else [part, wrong],
                    "answer": answer,
                    "word": words[place],
                }


def _between(text: str, limits: tuple[int, int]) -> bool:
    return limits[0] <= len(text) <= limits[1]


def _within(parts: Sequence[str], most: int) -> str:
    """Join as many of the first sentences as fit."""
    count = next((n for n in range(len(parts), 1, -1) if len(" ".join(parts[:n])) <= most), 1)
    return " ".join(parts[:count])[:most]


KINDS: Mapping[str, Callable[[Sequence[str], random.Random], Iterator[Item]]] = {
    "cloze": cloze,
    "continuation": continuation,
    "pairs": pairs,
}
TASKS = tuple(KINDS)


def make(documents: Sequence[str], kind: str, most: int = MOST) -> list[Item]:
    """Return at most that many items of a kind, the same for the same documents; no item twice."""
    found: dict[str, Item] = {}
    for item in KINDS[kind](documents, random.Random(0)):
        # Manuals repeat themselves: the text alone decides, whatever the order of the choices.
        found.setdefault(
            json.dumps([item["prompt"], item.get("target"), sorted(item.get("choices", []))]), item
        )
    items = list(found.values())
    random.Random(1).shuffle(items)
    return items[:most]


def held_out(text: Path) -> list[str]:
    """Return the documents of the val and measure splits of a text: no model trains on them."""
    source = open_source(DataConfig(data=str(text)))
    modulus = split_modulus(source)
    return [
        document
        for index, document in enumerate(source.documents())
        if split_of(index, modulus) in ("val", "measure")
    ]


def read(path: Path) -> list[Item]:
    """Read the items of a task."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digest(items: Sequence[Item]) -> str:
    """Return a hash of the items, by which scores are known to be of the same ones."""
    return hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()[:12]


def write_task(folder: Path, task: str, items: Sequence[Item]) -> None:
    """Write a task's items and its file for the harness, which names the items by their full path."""
    path = (folder / f"{task}.jsonl").resolve()
    write_text_atomic(path, "".join(f"{json.dumps(item, ensure_ascii=False)}\n" for item in items))
    lines = [
        f"task: {task}",
        "dataset_path: json",
        "dataset_kwargs:",
        "  data_files:",
        f"    test: {json.dumps(str(path))}",
        "test_split: test",
        'doc_to_text: "{{prompt}}"',
        'target_delimiter: ""',
    ]
    if task == "cloze":
        lines += ["output_type: loglikelihood", 'doc_to_target: "{{target}}"', "metric_list:"]
        lines += ["  - metric: perplexity", "  - metric: acc"]
    else:
        lines += ["output_type: multiple_choice", "doc_to_target: answer", "doc_to_choice: choices"]
        lines += ["metric_list:", "  - metric: acc", "  - metric: acc_norm"]
    write_text_atomic(folder / f"{task}.yaml", "\n".join([*lines, "metadata:", "  version: 1.0", ""]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="the text that the models train on")
    parser.add_argument("--out", type=Path, default=Path("runs/downstream"), help="the tasks go to OUT/tasks")
    arguments = parser.parse_args()
    folder = arguments.out / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    documents = held_out(arguments.text)
    for task in TASKS:
        items = make(documents, task)
        write_task(folder, task, items)
        print(f"{task}: {len(items)} items")


if __name__ == "__main__":
    main()
