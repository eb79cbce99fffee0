"""Tokenizing speed against `datasets.map`, and memory as the corpus grows.

    python benchmarks/tokenizing.py                      # speed on 100 MB, memory on 100 MB
    python benchmarks/tokenizing.py --memory-mb 100 1000 # memory on 100 MB and 1 GB too

The corpus is the embedded speeches, cut into documents of 5 000 characters (about openwebtext's average)
and repeated, as .jsonl. Ours reads the .jsonl and writes shards; `datasets.map` starts from the Arrow table
that `load_dataset` made beforehand and writes Arrow, with the same tokenizer, batched, one process a core.
Each arm runs in a process of its own, in turns; the ratios are those of neighbouring runs. MB are 10^6 bytes
of UTF-8 text. The result goes to benchmarks/results/tokenize-<date>.json.

(Not tokenize.py: the standard library has a module of that name, which a script beside it would hide.)
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
DOCUMENT_CHARACTERS = 5_000


def write_corpus(path: Path, megabytes: float) -> None:
    """Speeches in pieces, over and over, until the text has this many MB (10^6 bytes)."""
    from blockwise_lr.data.data_config import DataConfig
    from blockwise_lr.data.sources import open_source

    pieces = [
        speech[start : start + DOCUMENT_CHARACTERS]
        for speech in open_source(DataConfig()).documents()
        for start in range(0, len(speech), DOCUMENT_CHARACTERS)
    ]
    left = megabytes * 1e6
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            for piece in pieces:
                file.write(json.dumps({"text": piece}, ensure_ascii=False) + "\n")
                left -= len(piece.encode())
                if left <= 0:
                    break


def text_megabytes(path: Path) -> float:
    with path.open(encoding="utf-8") as file:
        return sum(len(json.loads(line)["text"].encode()) for line in file) / 1e6


def ours(corpus: Path, tokenizer: Path, out: Path) -> tuple[float, float]:
    """CPU seconds and seconds from .jsonl to shards."""
    from tokenizers import Tokenizer

    from blockwise_lr.data.sources import FileSource
    from blockwise_lr.data.tokenize import write_shards
    from blockwise_lr.data.vocabulary import Encoder

    encoder = Encoder(Tokenizer.from_file(str(tokenizer)), 0)
    return timed(lambda: write_shards(FileSource("corpus", [corpus]), encoder, out / "shards", 200))


def hugging_face(corpus: Path, tokenizer: Path, out: Path) -> tuple[float, float]:
    """CPU seconds and seconds of `datasets.map` alone."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    table = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(out))

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        encoded = fast(batch["text"], return_attention_mask=False, return_token_type_ids=False)
        return {"ids": encoded["input_ids"]}

    datasets.disable_progress_bars()
    return timed(lambda: table.map(encode, batched=True, num_proc=cores(), remove_columns=["text"]))


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds, finished children included; seconds). On a busy machine the first is the steadier one."""

    def cpu() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    begin, cpu_begin = time.perf_counter(), cpu()
    work()
    return cpu() - cpu_begin, time.perf_counter() - begin


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_process_of_its_own(arm: str, corpus: Path, tokenizer: Path) -> tuple[float, float, list[float]]:
    """(seconds, CPU seconds, resident memory in MB of the process and its children every 0.05 s)."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--arm", arm, str(corpus), str(tokenizer), out]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            samples = []
            while process.poll() is None:
                samples.append(resident_megabytes(process.pid))
                time.sleep(0.05)
            assert process.stdout is not None
            printed = process.stdout.read()
        if process.returncode:
            raise RuntimeError(f"the arm {arm} failed with exit code {process.returncode}")
    cpu, seconds = map(float, printed.split()[-2:])
    return seconds, cpu, samples


def resident_megabytes(pid: int) -> float:
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total / 1e6


def spread(values: list[float]) -> dict[str, float]:
    return {
        name: round(f(values), 3) for name, f in (("median", statistics.median), ("min", min), ("max", max))
    }


def hardware() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("tokenizers", "datasets", "transformers", "numpy")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--speed-mb", type=float, default=100, help="text to compare speeds on, in MB; 0: skip"
    )
    parser.add_argument(
        "--memory-mb", type=float, nargs="*", default=[100], help="texts to measure memory on, in MB"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each arm")
    parser.add_argument("--vocab-size", type=int, default=16384, help="tokens of the BPE")
    parser.add_argument("--arm", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        arm, *paths = arguments.arm
        print(*{"ours": ours, "datasets.map": hugging_face}[arm](*map(Path, paths)))
        return
    from blockwise_lr.data.data_config import DataConfig
    from blockwise_lr.data.sources import open_source
    from blockwise_lr.data.vocabulary import train_bpe
    from blockwise_lr.files import write_json_atomic

    result: dict[str, Any] = {"hardware": hardware(), "vocab_size": arguments.vocab_size}
    with tempfile.TemporaryDirectory() as folder:
        corpus, tokenizer = Path(folder) / "corpus.jsonl", Path(folder) / "tokenizer.json"
        train_bpe(open_source(DataConfig()).documents(), arguments.vocab_size).save(str(tokenizer))
        if arguments.speed_mb:
            write_corpus(corpus, arguments.speed_mb)
            megabytes = text_megabytes(corpus)
            speeds: dict[str, list[float]] = {"ours": [], "datasets.map": []}
            cpu: dict[str, list[float]] = {"ours": [], "datasets.map": []}
            for repeat in range(arguments.repeats):
                # Each arm goes first every other time, so that a drift of the machine favours neither.
                for arm, measured in sorted(speeds.items(), reverse=repeat % 2 == 0):
                    seconds, busy, _ = in_process_of_its_own(arm, corpus, tokenizer)
                    cpu[arm].append(busy)
                    measured.append(megabytes / seconds)
                    print(f"repeat {repeat}: {arm} {measured[-1]:.2f} MB/s", file=sys.stderr)
            result["speed"] = {
                "load_average": round(os.getloadavg()[0], 2),
                "text_mb": round(megabytes, 1),
                "mb_per_s": {arm: [round(value, 2) for value in values] for arm, values in speeds.items()},
                "ratio": spread([a / b for a, b in zip(speeds["ours"], speeds["datasets.map"])]),
                "cpu_seconds": {arm: [round(value, 1) for value in values] for arm, values in cpu.items()},
                "cpu_ratio": spread([b / a for a, b in zip(cpu["ours"], cpu["datasets.map"])]),
            }
        if arguments.memory_mb:
            result["memory"] = []
        for megabytes in arguments.memory_mb:
            write_corpus(corpus, megabytes)
            seconds, _, resident = in_process_of_its_own("ours", corpus, tokenizer)
            result["memory"].append(
                {
                    "load_average": round(os.getloadavg()[0], 2),
                    "text_mb": megabytes,
                    "seconds": round(seconds, 1),
                    "peak_rss_mb": round(max(resident)),
                    "rss_mb_at_quarters": [round(resident[len(resident) * k // 4]) for k in (1, 2, 3)],
                }
            )
            print(result["memory"][-1], file=sys.stderr)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"tokenize-{datetime.date.today().isoformat()}.json"
    # A second run of the day replaces what it measures and keeps the rest.
    earlier = json.loads(path.read_text("utf-8")) if path.exists() else {}
    command = " ".join(["python", "benchmarks/tokenizing.py", *sys.argv[1:]])
    commands = {section: command for section in ("speed", "memory") if section in result}
    commands = {**earlier.get("commands", {}), **commands}
    write_json_atomic(path, {**earlier, **result, "commands": commands})
    print(path)


if __name__ == "__main__":
    main()
