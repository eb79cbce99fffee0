"""Run one part of the GPU checks; gpu.sh runs them all.

    python benchmarks/gpu_checks.py correctness

`correctness`: the losses of 20 steps of GPT-2 small in bf16, compiled, with fused AdamW and split QKV, against fp32
without any of them; each alone too. `throughput`: tokens/s and the share of the card's peak (MFU) of `train` and of
train_throughput.py's loop, which is nanoGPT's, compiled both. `sharpness`: sharpness_cost.py's first table.
`optimizers`: steps of Adam-mini, Muon and others against AdamW's. `compare`: AdamW with one learning rate and with
MEASURED_RATIOS, both tuned, on a LLaMA of 134M. `fsdp2`: transformers' Trainer under accelerate's FSDP2 against plain.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import GPT2_SMALL, GPT2_TINY, Ratio, argument_parser, finish, in_turns, ratio
from sharpness_cost import against_a_step
from train_throughput import process

from blockwise_lr import param_groups, split_fused
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.environment import describe_environment
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.presets import get_preset
from optimizers import compare as compare_optimizer

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bf16 operations a second, by the makers' data sheets."""
BF16_OFF, FP32_OFF = 0.05, 1e-3  # nats


def prepare(arguments: argparse.Namespace) -> None:
    """Tokens of the embedded text as nanoGPT has them, by a BPE made from it."""
    from tokenizers import ByteLevelBPETokenizer

    from blockwise_lr.data.sources import open_source

    texts = list(open_source(DataConfig()).documents())[: 40 if arguments.tiny else None]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=300 if arguments.tiny else 8192, show_progress=False)
    tokens = np.concatenate([np.array(each.ids, np.uint16) for each in bpe.encode_batch(texts)])
    arguments.data.mkdir(parents=True, exist_ok=True)
    held_out = len(tokens) // 10
    tokens[:-held_out].tofile(arguments.data / "train.bin")
    tokens[-held_out:].tofile(arguments.data / "val.bin")
    print(f"{arguments.data}: {len(tokens)} tokens, {tokens.nbytes / 2**20:.1f} MiB")


def config(arguments: argparse.Namespace, preset: str, **settings: Any) -> TrainConfig:
    if not (arguments.data / "train.bin").is_file():
        raise SystemExit(f"{arguments.data} has no train.bin: run gpu.sh prepare first")
    made = replace(get_preset(preset), device=arguments.device, eval_every=0, save_every=0, **settings)
    if arguments.tiny:
        shape = replace(GPT2_TINY, vocab_size=300, family=made.model.family)
        made = replace(made, model=shape, batch_size=4, log_every=2, eval_tokens=512, compile=False)
    return replace(made, report_to="none", data=DataConfig(data=str(arguments.data)))


def correctness(arguments: argparse.Namespace) -> None:
    text = torch.from_numpy(np.fromfile(arguments.data / "train.bin", np.uint16).astype(np.int64))
    shape = replace(GPT2_TINY, vocab_size=300) if arguments.tiny else GPT2_SMALL
    steps, rows, length, lr = (6, 2, 32, 1e-2) if arguments.tiny else (20, 8, 512, 3e-4)

    def losses(*, split: bool, fused: bool, compiled: bool, half: bool) -> list[float]:
        model = build_model(shape, seed=0).to(arguments.device).eval()  # no dropout
        if split:
            split_fused(model)
        forward = torch.compile(model) if compiled and not arguments.tiny else model
        optimizer = torch.optim.AdamW(param_groups(model, lr, {}), lr=lr, fused=fused)
        found = []
        for step in range(steps):
            ids = text[step * rows * length :][: rows * length].view(rows, length).to(arguments.device)
            with torch.autocast(arguments.device, torch.bfloat16, enabled=half):
                loss = forward(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    plain = {"split": False, "fused": False, "compiled": False, "half": False}
    reference = losses(**plain)
    arms = {name: {**plain, name: True} for name in plain} | {"all": dict.fromkeys(plain, True)}
    measured = {name: losses(**arm) for name, arm in arms.items()}
    apart = {name: max(abs(a - b) for a, b in zip(found, reference)) for name, found in measured.items()}
    write(arguments, {"reference": reference, "losses": measured, "largest_difference": apart})
    wrong = {name: off for name, off in apart.items() if off > (BF16_OFF if arms[name]["half"] else FP32_OFF)}
    if wrong or not reference[-1] < reference[0]:
        raise SystemExit(
            f"not equal to fp32: {wrong}; fp32's losses {reference[0]:.3f} .. {reference[-1]:.3f}"
        )


def throughput(arguments: argparse.Namespace) -> None:
    settings: dict[str, Any] = {"steps": 8 if arguments.tiny else 60, "log_every": 10}
    made = config(arguments, "gpt2-small", batch_size=16, accumulation=1, **settings)
    with tempfile.TemporaryDirectory() as folder:
        names = ["train", "bare"] if arguments.tiny else ["train, compiled", "bare, compiled"]
        arms = {name: process(name, made, Path(folder), 2) for name in names}
        runs = in_turns(arms, -(-arguments.repeats // 5))  # a minute each, most of it compiling
    speed = {name: [run.tokens_per_second for run in found] for name, found in runs.items()}
    model = made.model
    parameters = sum(p.numel() for p in build_model(model, seed=0).parameters())
    per_token = 6 * parameters + 12 * model.layers * model.hidden_size * model.context
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else ""
    peak = next((found for name, found in PEAK.items() if name in card), None)
    mfu = (
        {name: [value * per_token / peak for value in found] for name, found in speed.items()} if peak else {}
    )
    finish(
        __file__,
        arguments,
        settings={"config": made.to_dict(), "flops_per_token": per_token, "peak": peak},
        measurements={"tokens/s": speed, "MFU": mfu},
        ratios=[ratio(speed, *names, what="tokens/s", at_least=1.0)],
    )


def sharpness(arguments: argparse.Namespace) -> None:
    shape = replace(GPT2_TINY, context=32) if arguments.tiny else GPT2_SMALL
    model = split_fused(build_model(shape, seed=0)).to(arguments.device).train()
    ids = torch.randint(shape.vocab_size, (4, shape.context), device=arguments.device)
    seconds, ratios = against_a_step("GPT-2", model, ids, arguments.repeats)
    finish(
        __file__,
        arguments,
        settings={"batch": list(ids.shape)},
        measurements={"GPT-2, s": seconds},
        ratios=ratios,
    )


def optimizers(arguments: argparse.Namespace) -> None:
    measurements: dict[str, Any] = {}
    ratios: list[Ratio] = []
    shape = GPT2_TINY if arguments.tiny else GPT2_SMALL
    for name in (
        ("adam-mini", "muon") if arguments.tiny else ("adam-mini", "adam-mini, compiled", "muon", "lion")
    ):
        compare_optimizer(name, "GPT-2", shape, arguments.repeats, measurements, ratios, arguments.device)
    finish(__file__, arguments, settings={"shape": vars(shape)}, measurements=measurements, ratios=ratios)


def compare(arguments: argparse.Namespace) -> None:
    """Goes on in benchmarks/gpu-data/compare where it was cut off."""
    made = config(arguments, "llama-134m", steps=12 if arguments.tiny else 400, batch_size=32, log_every=10)
    folder = arguments.data / ("compare-tiny" if arguments.tiny else "compare")
    rates = ["1e-3"] if arguments.tiny else ["3e-4", "6e-4", "1.2e-3", "2.4e-3"]
    file = arguments.data / "compare.json"
    write_json_atomic(file, made.to_dict())
    command = ["compare", str(file), "--out", str(folder), "--arms", "adamw:uniform", "adamw:measured"]
    run(["-m", "blockwise_lr", *command, "--base-lrs", *rates, "--jobs", "1"])
    write(arguments, {"comparison": json.loads((folder / "compare.json").read_text())})
    print("compare: finished")


def fsdp2(arguments: argparse.Namespace) -> None:
    if arguments.device == "cpu":
        write(arguments, {"skipped": "on the CPU accelerate runs DDP where FSDP was asked for"})
        print("fsdp2: left out on the CPU")
        return
    made = config(arguments, "llama-134m", steps=40, batch_size=16, log_every=10)
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--use_fsdp", "--fsdp_version", "2"]
    launch += ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--mixed_precision", "no"]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        write_json_atomic(file, made.to_dict())
        for name, before in (("plain", []), ("fsdp2", launch)):
            run([*before, "-m", "blockwise_lr", "train", str(file), "--out", f"{folder}/{name}"])
            rows = read_metrics(Path(folder) / name / "metrics.jsonl")
            found[name] = [row["train_loss"] for row in rows]
    apart = max(abs(a - b) for a, b in zip(found["plain"], found["fsdp2"], strict=True))
    write(arguments, {"losses": found, "largest_difference": apart})
    if apart > BF16_OFF:
        raise SystemExit(f"losses under FSDP2 differ by {apart:.3g} from those of one plain process")


def run(command: list[str]) -> None:
    subprocess.run([sys.executable, *command], check=True)


def write(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    environment = describe_environment(arguments.device)
    tiny = "-quick" if arguments.tiny else ""
    path = arguments.out / f"gpu_checks-{arguments.part}{tiny}-{environment['date'][:10]}.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, {"part": arguments.part, **environment, **found})
    print(path)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "prepare": prepare,
    "correctness": correctness,
    "throughput": throughput,
    "sharpness": sharpness,
    "optimizers": optimizers,
    "compare": compare,
    "fsdp2": fsdp2,
}


def main() -> None:
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the same as --quick")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "gpu-data")
    arguments = parser.parse_args()
    arguments.tiny = arguments.quick = arguments.tiny or arguments.quick
    if arguments.part != "prepare" and arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        raise SystemExit(2)
    torch.manual_seed(0)
    PARTS[arguments.part](arguments)


if __name__ == "__main__":
    main()
