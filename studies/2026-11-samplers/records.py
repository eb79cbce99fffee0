"""Read the runs that earlier studies recorded: settings, tune loss and, where it was kept, the loss curve."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blockwise_lr.train.ratio_text import parse_ratios

STUDIES = Path(__file__).parents[1]
RULES, OPTIMIZERS = STUDIES / "2026-11-ratio-rules/data", STUDIES / "2026-11-optimizers/data"
QUICKSTART = STUDIES / "2026-11-quickstart-ratios/data"
BLOCKS = ("emb", "head", "norm", "qk", "vo", "ffn")
STANDARD = {"decay": "coupled", "weight_decay_by_block": "", "clip_by_block": ""}
"""The settings of nearly all runs whose folders were kept. Runs with other values are left out."""
SHAPES = {
    ("llama", 64): "llama-600k",
    ("llama", 128): "llama-2m",
    ("llama", 256): "llama-5m",
    ("gpt2", 128): "gpt2-1m",
    ("gpt2", 256): "gpt2-4m",
}


@dataclass(frozen=True)
class Run:
    """One finished training run.

    Args:
        setting: model, optimizer where it is not AdamW, schedule where it is not cosine, and steps.
        ratios: learning-rate ratio by block, ordered as BLOCKS; None if :func:`ratios_of` knows none.
        base_lr: peak learning rate of a block whose ratio is 1.
        warmup: linear warm-up as a share of the steps.
        seed: of the initial weights and the order of the text.
        tune_loss: the loss that a search minimises, at the end of the run.
        val_loss: the loss at the end of the run on the split of the curve.
        curve: pairs of step and val loss during the run, without the last step; empty if it was not kept.
        train: pairs of step and mean train loss since the pair before, every ten steps; empty if it was not kept.
    """

    setting: str
    ratios: tuple[float, ...] | None
    base_lr: float
    warmup: float
    seed: int
    tune_loss: float
    val_loss: float
    curve: tuple[tuple[int, float], ...] = ()
    train: tuple[tuple[int, float], ...] = ()

    @property
    def steps(self) -> int:
        """The number of optimizer steps, from the setting's name."""
        return int(self.setting.split()[-2])


def ratios_of(text: str) -> tuple[float, ...] | None:
    """Return the ratios that a text names or lists, ordered as BLOCKS.

    None if they move during the run, or if a block outside BLOCKS has a ratio of its own.

    Example:
        >>> ratios_of("emb=16,vo=0.5"), ratios_of("auto:gain=10")
        ((16.0, 1.0, 1.0, 1.0, 0.5, 1.0), None)
    """
    if text.startswith("auto") or " " in text:
        return None
    ratios = {block.value: ratio for block, ratio in parse_ratios(text).items()}
    return None if any(ratios[block] != 1 for block in ratios.keys() - set(BLOCKS)) else in_order(ratios)


def in_order(ratios: Mapping[str, float]) -> tuple[float, ...]:
    """Return the ratios ordered as BLOCKS; a missing block has ratio 1."""
    return tuple(float(ratios.get(block, 1.0)) for block in BLOCKS)


def all_runs() -> list[Run]:
    """Return every run that is recorded in the studies, without duplicates, in a fixed order.

    Where a run was recorded with its curve and without, the one with the curve is returned.
    """
    unique: dict[Any, Run] = {}
    for run in (*_from_folders(), *_from_comparisons(), *_from_lists()):
        key = (
            run.setting,
            run.ratios,
            f"{run.base_lr:.3g}",
            round(run.warmup, 3),
            run.seed,
            round(run.tune_loss, 6),
        )
        if key not in unique or len(unique[key].curve) < len(run.curve):
            unique[key] = run
    return sorted(unique.values(), key=lambda run: (run.setting, run.tune_loss, run.base_lr, run.seed))


def by_setting(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Return the runs of every setting."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.setting, []).append(run)
    return found


def run_to_run_noise(runs: Iterable[Run]) -> float:
    """Return the standard deviation of one run's tune loss: what is left after its point's and its seed's means.

    A search trains all its runs with one seed, so what the seed changes for all points is no noise to it. Every setting
    with two points or more that were trained with seeds 0, 1 and 2 counts.
    """
    total, freedom = 0.0, 0
    for members in by_setting(runs).values():
        points: dict[Any, dict[int, float]] = {}
        for run in members:
            if run.ratios is not None:
                points.setdefault((run.ratios, f"{run.base_lr:.3g}", run.warmup), {})[run.seed] = (
                    run.tune_loss
                )
        losses = np.array([[point[0], point[1], point[2]] for point in points.values() if len(point) == 3])
        if len(losses) > 1:
            left = losses - losses.mean(1, keepdims=True) - losses.mean(0) + losses.mean()
            total, freedom = total + float((left**2).sum()), freedom + 2 * (len(losses) - 1)
    return math.sqrt(total / freedom)


def _from_folders() -> Iterator[Run]:
    """Yield the runs whose folders were kept, packed or not."""
    for archive in sorted((*RULES.glob("*/*runs.tar.gz"), *OPTIMIZERS.glob("*/runs.tar.gz"))):
        with tarfile.open(archive) as packed:
            files = {entry.name: entry for entry in packed if entry.isfile()}

            def text(name: str, packed: tarfile.TarFile = packed, files: Any = files) -> str:
                return io.TextIOWrapper(packed.extractfile(files[name]), encoding="utf-8").read()  # type: ignore[arg-type]

            for folder in sorted({name.split("/")[0] for name in files}):
                yield from _from_folder(*(text(f"{folder}/{name}") for name in _KEPT))
    for path in sorted(QUICKSTART.glob("runs/*")):
        yield from _from_folder(*((path / name).read_text(encoding="utf-8") for name in _KEPT))


_KEPT = ("config.json", "metrics.jsonl", "result.json")


def _from_folder(config_text: str, metrics: str, result_text: str) -> Iterator[Run]:
    config, result = json.loads(config_text)["train"], json.loads(result_text)
    optim, model = config["optim"], config["model"]
    if (
        any(optim.get(name, value) != value for name, value in STANDARD.items())
        or result["terminal_tune_loss"] is None
    ):
        return
    shape = SHAPES[model["family"], model["hidden_size"]]
    kind = [optim["optimizer"]] * (optim["optimizer"] != "adamw") + [optim["schedule"]] * (
        optim["schedule"] != "cosine"
    )
    rows = [json.loads(line) for line in metrics.splitlines()]
    curve = [(row["step"], row["val_loss"]) for row in rows if row["val_loss"] is not None]
    yield Run(
        ", ".join([shape, *kind, f"{config['steps']} steps"]),
        ratios_of(optim["ratios"]),
        optim["base_lr"],
        optim["warmup_fraction"],
        config["seed"],
        result["terminal_tune_loss"],
        result["terminal_val_loss"],
        tuple(point for point in curve if point[0] < config["steps"]),
        tuple((row["step"], row["train_loss"]) for row in rows),
    )


def _from_comparisons() -> Iterator[Run]:
    """Yield the runs in compare.json and added-rules.json of the AdamW settings."""
    for path in sorted(RULES.glob("*/compare.json")):
        study, shape = json.loads(path.read_text(encoding="utf-8")), path.parent.name
        arms = study["arms"]
        for trial in study["tuning"]:
            yield from _one(shape, arms[trial["arm"]]["ratios"], trial, trial["steps"])
        for other in study["other_runs"]:
            yield from _one(shape, other["ratios"], other, other["steps"])
        for arm in arms.values():
            for seed in arm["seeds"]:
                yield from _one(shape, arm["ratios"], {**arm, **seed}, arm["steps"])
    for path in sorted(RULES.glob("*/added-rules.json")):
        for arm in json.loads(path.read_text(encoding="utf-8"))["arms"].values():
            for trial in arm["tuning"]:
                yield from _one(path.parent.name, arm["ratios"], {**trial, **trial["point"]}, arm["steps"])


def _from_lists() -> Iterator[Run]:
    """Yield the runs of searches and single trials, which hold a point and its losses."""

    def read(path: Path) -> Any:
        return json.loads(path.read_text(encoding="utf-8"))

    for trial in read(RULES / "search/llama-2m.json")["ratios"]["runs"]:
        point = dict(trial["point"])
        yield from _one("llama-2m", None, {**trial, **point}, 300, in_order(point))
    lists = (read(RULES / "trials.json")["tried"], read(RULES / "cheaper-rules.json")["tried"])
    for trial in (*lists[0], *lists[1], *read(RULES / "edges.json")["runs"]):
        point = trial["point"]
        yield from _one(point["setting"], point["ratios"], {**trial, **point}, 300)


def _one(
    shape: str,
    ratios: str | None,
    found: Mapping[str, Any],
    steps: int,
    values: tuple[float, ...] | None = None,
) -> Iterator[Run]:
    tune = found.get("tune_loss", found.get("terminal_tune_loss"))
    val = found.get("val_loss", found.get("terminal_val_loss"))
    if tune is None:
        return
    warmup = found.get("warmup_fraction", found.get("warmup", 0.15))
    if ratios is not None:
        values = ratios_of(ratios)
    yield Run(f"{shape}, {steps} steps", values, found["base_lr"], warmup, found.get("seed", 0), tune, val)
