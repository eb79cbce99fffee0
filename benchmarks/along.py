"""The trials that led to ratios measured along a run: leads (one seed each), not evidence. That is ratios.py.

    python benchmarks/along.py --out runs/along

Trains uniform runs (ALONG), measures the learning rate that each block could take along them, and trains from scratch
with ratios from there and from other rules (TRIED), all at seed 0. Runs are cached in --out. Writes
results/ratios/along/: every measurement and tried.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from _runs import run
from ratios import RESULTS, config_of, directional_along

from blockwise_lr.files import write_json_atomic
from blockwise_lr.optim.ratios import parse_ratios
from blockwise_lr.pretrain.environment import describe_environment


class Along(NamedTuple):
    """A run that is measured along its way, at 15 to 20 points."""

    setting: str
    base_lr: float
    steps: int = 300
    ratios: str = "uniform"


FROM_4E_3 = "emb=11,qk=1.6,vo=0.48,norm=43,head=9.6"
ALONG = {
    "llama-2m-4e-3": Along("llama-2m", 4e-3),
    "llama-2m-1e-3": Along("llama-2m", 1e-3),
    "llama-2m-4e-3-75steps": Along("llama-2m", 4e-3, 75),
    "llama-2m-1e-3-75steps": Along("llama-2m", 1e-3, 75),
    "llama-2m-2e-3-40steps": Along("llama-2m", 2e-3, 40),
    "llama-2m-again": Along("llama-2m", 2.4e-3, 300, FROM_4E_3),
    "gpt2-1m-8e-3": Along("gpt2-1m", 8e-3),
    "gpt2-1m-4e-3-75steps": Along("gpt2-1m", 4e-3, 75),
    "gpt2-1m-1e-3-75steps": Along("gpt2-1m", 1e-3, 75),
    "llama-5m-4e-3-75steps": Along("llama-5m", 4e-3, 75),
    "llama-5m-1e-3-75steps": Along("llama-5m", 1e-3, 75),
}

LLAMA_4E_3_SHORT = "emb=10.4,qk=2.48,vo=0.515,norm=8.13,head=4.53"
LLAMA_1E_3 = "emb=15.8,qk=4.49,vo=0.5,norm=32,head=27.9"
GPT2_1E_3_SHORT = "emb=18.2,qk=3.41,vo=0.397,norm=24.5,pos=2.63"
CURVATURE = "emb=4,qk=5,vo=1.4,norm=30,head=1.6"
# (setting, where the ratios are from, ratios, base learning rate, warm-up)
TRIED = (
    ("llama-2m", "llama-2m-4e-3", FROM_4E_3, 2.4e-3, 0.15),
    ("llama-2m", "llama-2m-4e-3", FROM_4E_3, 1.2e-3, 0.15),
    ("llama-2m", "llama-2m-4e-3", FROM_4E_3, 1.2e-3, 0.6),
    ("llama-2m", "llama-2m-4e-3, VO 0.2", "emb=11,qk=1.6,vo=0.2,norm=43,head=9.6", 1.2e-3, 0.15),
    ("llama-2m", "llama-2m-1e-3", LLAMA_1E_3, 6e-4, 0.15),
    ("llama-2m", "llama-2m-1e-3", LLAMA_1E_3, 1.2e-3, 0.15),
    ("llama-2m", "llama-2m-1e-3", LLAMA_1E_3, 2.4e-3, 0.15),
    ("llama-2m", "llama-2m-4e-3-75steps", LLAMA_4E_3_SHORT, 1.2e-3, 0.15),
    ("llama-2m", "llama-2m-4e-3-75steps", LLAMA_4E_3_SHORT, 2.4e-3, 0.15),
    ("llama-2m", "llama-2m-1e-3-75steps, high=100", "emb=7.65,qk=9.68,vo=0.145,norm=17.6,head=4.06", 2e-3, 0.15),
    ("llama-2m", "llama-2m-again", "emb=62,qk=2.59,vo=0.464,norm=41.4,head=16.2", 1.2e-3, 0.15),
    ("llama-2m", "curvature alone, c^-1/2", CURVATURE, 1.2e-3, 0.15),
    ("llama-2m", "curvature alone, c^-1/2", CURVATURE, 2.4e-3, 0.15),
    ("gpt2-1m", "gpt2-1m-8e-3", "emb=3.26,qk=2.4,vo=0.757,norm=5.95,pos=2.18", 2e-3, 0.15),
    ("gpt2-1m", "gpt2-1m-8e-3", "emb=3.26,qk=2.4,vo=0.757,norm=5.95,pos=2.18", 4e-3, 0.15),
    ("gpt2-1m", "gpt2-1m-4e-3-75steps", "emb=2.97,qk=0.819,vo=0.367,norm=3.77", 2e-3, 0.15),
    ("gpt2-1m", "gpt2-1m-1e-3-75steps", GPT2_1E_3_SHORT, 1e-3, 0.15),
    ("gpt2-1m", "gpt2-1m-1e-3-75steps", GPT2_1E_3_SHORT, 2e-3, 0.15),
    ("gpt2-1m", "llama-2m-4e-3-75steps", "emb=10.4,qk=2.48,vo=0.515,norm=8.13,pos=2", 2e-3, 0.15),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/along"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    kept = RESULTS / "along"
    kept.mkdir(parents=True, exist_ok=True)

    def measure(name: str) -> dict[str, Any]:
        case = ALONG[name]
        config = out / f"{name}.json"
        write_json_atomic(config, replace(config_of(case.setting, out), steps=case.steps).to_dict())
        found = directional_along(config, out / name, case.base_lr, case.ratios)
        shutil.copy(found, kept / f"{name}.json")
        ratios = {block.value: float(f"{r:.3g}") for block, r in parse_ratios(str(found)).items()}
        return {**case._asdict(), "found": ratios}

    def train(setting: str, source: str, ratios: str, base_lr: float, warmup: float) -> dict[str, Any]:
        config = config_of(setting, out)
        optim = replace(config.optim, ratios=ratios, base_lr=base_lr, warmup_fraction=warmup)
        point = {
            "setting": setting,
            "ratios_from": source,
            "ratios": ratios,
            "base_lr": base_lr,
            "warmup": warmup,
        }
        return run(out, replace(config, eval_every=0, optim=optim), point)

    with ThreadPoolExecutor(2) as pool:
        along = dict(zip(ALONG, pool.map(measure, ALONG)))
        tried = list(pool.map(lambda case: train(*case), TRIED))
    about = {"command": " ".join(sys.argv), **describe_environment("cpu")}
    write_json_atomic(kept / "tried.json", {**about, "along": along, "tried": tried})
    print(json.dumps(along, indent=1))


if __name__ == "__main__":
    main()
