"""Train with ratios that were measured along runs, at seed 0: the trials that led to the rule `measured`.

    python studies/2026-11-ratio-rules/try_measured_ratios.py --out runs/along

These are leads of one seed each, not evidence; the evidence is in compare_rules.py. Each trial of TRIED trains from
scratch. The trials up to 2026-11-23 use measurements that took the signal where an update had led to, and each block's
room from there (git commit 7a7aab8). The later ones use data/llama-2m/directional.json; "alone" uses best_lr in place
of the joint minimiser. Trials that are in data/trials.json are not trained again; new ones are added to it.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.environment import describe_environment

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from compare_rules import DATA
from kept_runs import run
from model_settings import config_of

FROM_4E_3 = "emb=11,qk=1.6,vo=0.48,norm=43,head=9.6"
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
    ("llama-2m", "own, each block alone", "emb=3.84,qk=2.23,vo=0.77,norm=7.09,head=5.31", 1.41e-3, 0.15),
    ("llama-2m", "own, each block alone", "emb=3.84,qk=2.23,vo=0.77,norm=7.09,head=5.31", 2e-3, 0.15),
    ("llama-2m", "own, each block alone", "emb=3.84,qk=2.23,vo=0.77,norm=7.09,head=5.31", 7.07e-4, 0.15),
    ("llama-2m", "own, each block alone", "emb=3.84,qk=2.23,vo=0.77,norm=7.09,head=5.31", 1e-3, 0.15),
    ("llama-2m", "own, all together", "emb=9.04,qk=1.48,vo=0.312,norm=19.9,head=16.7", 1.41e-3, 0.15),
    ("llama-2m", "own, all together", "emb=9.04,qk=1.48,vo=0.312,norm=19.9,head=16.7", 2e-3, 0.15),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/along"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    path = DATA / "trials.json"
    known = json.loads(path.read_text())
    done = [each["point"] for each in known["tried"]]

    def train(setting: str, source: str, ratios: str, base_lr: float, warmup: float) -> dict[str, Any] | None:
        config = config_of(setting, out)
        optim = replace(config.optim, ratios=ratios, base_lr=base_lr, warmup_fraction=warmup)
        point = {
            "setting": setting,
            "ratios_from": source,
            "ratios": ratios,
            "base_lr": base_lr,
            "warmup": warmup,
        }
        if point in done:
            return None
        return {**run(out, replace(config, eval_every=0, optim=optim), point), "date": today}

    today = describe_environment("cpu")["date"]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda case: train(*case), TRIED))
    known["tried"] += [each for each in found if each is not None]
    write_json_atomic(path, known)


if __name__ == "__main__":
    main()
