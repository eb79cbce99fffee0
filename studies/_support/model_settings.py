"""The models, texts and tuning grids that several studies share, by the name of the setting."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import replace
from pathlib import Path

from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.presets import get_preset

GRID = (1e-3, 2e-3, 4e-3, 8e-3)
WARMUPS = (0.15, 0.6)
SEEDS = (0, 1, 2)


def settings() -> dict[str, TrainConfig]:
    """The training configuration of each setting, by name. `llama-2m` is the one the ratios were made from."""
    # Precision and warm-up are those of the runs that are kept; without bf16 instructions a CPU takes hours for one.
    fixed = {"device": "cpu", "precision": "bf16", "report_to": "none", "save_every": 0}
    quickstart = replace(get_preset("quickstart"), **fixed)
    fixed_optim = {"ratios": "uniform", "base_lr": 4e-3, "warmup_fraction": 0.15, "warmup_start": "zero"}
    optim = replace(quickstart.optim, **fixed_optim)
    quickstart = replace(quickstart, optim=optim)
    model = quickstart.model
    gpt2 = {"family": "gpt2", "tied": True}
    wide = {"hidden_size": 256, "heads": 4}
    return {
        "llama-600k": replace(quickstart, model=replace(model, hidden_size=64, heads=1)),
        "llama-2m": quickstart,
        "gpt2-1m": replace(quickstart, model=replace(model, **gpt2)),
        "llama-5m": replace(quickstart, model=replace(model, **wide)),
        "gpt2-4m": replace(quickstart, model=replace(model, **wide, **gpt2)),
        "llama-2m-code": replace(quickstart, data=replace(quickstart.data, data="CODE")),
        "llama-10m": replace(quickstart, model=replace(model, hidden_size=320, heads=5, layers=5)),
    }


def config_of(setting: str, out: Path) -> TrainConfig:
    """The configuration of a setting. Its text is written to `out` if it has to be made."""
    config = settings()[setting]
    if config.data.data == "CODE":
        return replace(config, data=replace(config.data, data=str(python_source(out))))
    return config


def python_source(out: Path) -> Path:
    """Write the text of `llama-2m-code`, Python's standard library with one document a module, and return its path."""
    path = out / "python.jsonl"
    if not path.exists():
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p for p in root.rglob("*.py") if not {"site-packages", "test", "tests"} & set(p.parts))
        lines = [json.dumps({"text": p.read_text(encoding="utf-8", errors="replace")}) for p in files]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(path)
    return path
