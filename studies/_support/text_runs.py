"""Train the arms of a queue on a text or other data: a process a core, a JSON file a run, resumed where it stopped."""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arms import Arm
from filelock import FileLock, Timeout
from shapes import CONTEXT, VOCABULARY
from stacked import Stack, Text
from tuning import Results

from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import prepare_data
from blockwise_lr.data.shards import TokenShards
from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.allocator import keep_freed_memory
from blockwise_lr.train.environment import describe_environment

Queue = Callable[[Results, Sequence[str]], list[Arm]]
"""Returns the arms that are still to be trained, in order, of the shapes that are named (none: of all)."""


Trainer = Callable[[list[Arm], Any, argparse.Namespace], list[dict[str, Any]]]
"""Trains arms of one shape and length on the data to their end and returns the result of each."""


@dataclass(frozen=True)
class Source:
    """Where the data of a study come from.

    Args:
        name: what the data are; "text" makes the flag --text and the key "text" of a result.
        help: what the flag names.
        form: what it has to name, for the message where the flag is missing.
        read: returns the data and what describes them, from the path and the command's arguments.
    """

    name: str
    help: str
    form: str
    read: Callable[[Path, argparse.Namespace], tuple[Any, dict[str, Any]]]


def main(
    description: str | None,
    queue: Queue,
    shapes: Sequence[str],
    *,
    results: Path,
    out: Path,
    trainer: Trainer | None = None,
    source: Source | None = None,
    minutes: Callable[[Arm], float] | None = None,
) -> None:
    """Run the command line of a study.

    Args:
        description: its help.
        queue: what to train next.
        shapes: the names of the models, for --shapes.
        results, out: the defaults of --results and --out.
        trainer: how to train; None: AdamW, by `stacked`.
        source: the data; None: a text.
        minutes: an estimate of what an arm takes on a core, for --list.
    """
    source = source or TEXT
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(f"--{source.name}", type=Path, help=f"{source.help}; not needed with --list")
    parser.add_argument("--out", type=Path, default=out, help="tokens and checkpoints")
    parser.add_argument("--results", type=Path, default=results, help="one JSON file a run")
    parser.add_argument("--stack", type=int, default=1, help="arms of one shape and length at once")
    parser.add_argument("--shapes", nargs="*", default=[], choices=sorted(shapes), help="only these models")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so long")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="train arms that are alone by torch.compile")
    parser.add_argument("--list", action="store_true", help="show the queue and train nothing")
    arguments = parser.parse_args()
    if arguments.list:
        known = queue(load(arguments.results), arguments.shapes)
        for arm in known:
            print(arm.name, json.dumps(arm.to_dict()))
        if minutes is not None:
            total = sum(minutes(arm) for arm in known)
            print(f"{len(known)} runs known to be needed, about {total:.0f} core-minutes; others follow.")
        return
    if (path := getattr(arguments, source.name)) is None:
        parser.error(f"--{source.name} is missing: {source.form}")
    torch.set_num_threads(1)
    keep_freed_memory()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.results.mkdir(parents=True, exist_ok=True)
    data, about = source.read(path, arguments)
    end = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < end and (arms := queue(load(arguments.results), arguments.shapes)):
        with ExitStack() as locks:
            if taken := claim(arms, arguments.out, arguments.results, arguments.stack, locks):
                train(taken, data, {source.name: about}, arguments, trainer or by_stack)
            else:
                time.sleep(10)  # another process has what is known to be needed


def load(folder: Path) -> Results:
    """Read every run that has ended."""
    return Results({path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))})


def claim(arms: list[Arm], out: Path, results: Path, most: int, locks: ExitStack) -> list[Arm]:
    """Take the first arm that no other process has or has ended meanwhile, and up to `most` of its shape and length."""
    taken: list[Arm] = []
    for arm in arms:
        if len(taken) < most and all((arm.shape, arm.steps) == (one.shape, one.steps) for one in taken):
            try:
                locks.enter_context(FileLock(out / f"{arm.name}.lock", timeout=0))
            except Timeout:
                continue
            if not (results / f"{arm.name}.json").exists():
                taken.append(arm)
    return taken


def train(
    arms: list[Arm], data: Any, about: dict[str, Any], arguments: argparse.Namespace, trainer: Trainer
) -> None:
    """Train the arms to their end and write their results, with what describes the data."""
    for arm, result in zip(arms, trainer(arms, data, arguments)):
        environment = describe_environment(arguments.device)
        write_json_atomic(arguments.results / f"{arm.name}.json", {**result, **about, **environment})
        print(
            result["tune_loss"], result["val_loss"], result["seconds"], json.dumps(arm.to_dict()), flush=True
        )


def by_stack(arms: list[Arm], text: Text, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train with AdamW, from the last checkpoint if there is one."""
    checkpoint = arguments.out / f"{'-'.join(sorted(arm.name for arm in arms))[:200]}.pt"
    return Stack(arms, text, device=arguments.device, compiled=arguments.compile).run(checkpoint=checkpoint)


def tokens(path: Path, out: Path) -> tuple[Text, dict[str, Any]]:
    """Return the windows of the text by the BPE of 3 072 tokens that is trained on it, and what describes them."""
    if path.suffix == ".xz":
        unpacked = out / path.stem
        with FileLock(out / "unpacking.lock"):
            if not unpacked.exists():
                with lzma.open(path) as packed, unpacked.with_suffix(".tmp").open("wb") as file:
                    shutil.copyfileobj(packed, file)
                unpacked.with_suffix(".tmp").replace(unpacked)
        path = unpacked
    config = DataConfig(data=str(path), cache=str(out / "cache"))
    data = prepare_data(config, vocab_size=VOCABULARY, context=CONTEXT, progress=False)

    def windows(shards: TokenShards) -> Any:
        count = shards.n_windows(CONTEXT)
        return shards.read(0, count * CONTEXT).astype("uint16").reshape(count, CONTEXT)

    text = Text(windows(data.train), windows(data.tune), windows(data.val))
    kept = ("tokenizer_sha256", "content_sha256", "splits", "split")
    return text, {name: data.describe()[name] for name in kept}


TEXT = Source(
    "text",
    "the text",
    'one {"text": ...} a line, .jsonl or .jsonl.xz',
    lambda path, arguments: tokens(path, arguments.out),
)
"""A text by the study's tokenizer."""
