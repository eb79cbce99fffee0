"""Train LLaMA-134M with several sets of ratios, rates and warm-ups, one run after the other, in one process.

    python studies/2026-11-paper-scale/train.py --data TOKENS --out FILE.json \
        --measure uniform:6e-4:0.15:240 --search uniform measured paper own --steps 240
    python studies/2026-11-paper-scale/train.py --data TOKENS --out FILE.json \
        --runs uniform:1.2e-3:0.2:1000 measured:4.2e-4:0.15:1000

A run is RATIOS:BASE_LR:WARM_UP:STEPS. RATIOS: a name, "emb=16,norm=32", a JSON file, or "own": what the run of
--measure found. TOKENS is a folder with train.bin and val.bin: uint16 tokens of GPT-2, as nanoGPT writes them. The
first half of val.bin chooses rates, the second half is reported. FILE.json is written after every run; the same
command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bracket import bracket
from llama import ROWS, Llama

from blockwise_lr import Block, DirectionalReport
from blockwise_lr.files import write_json_atomic
from blockwise_lr.optim.ratios import resolve_ratios
from blockwise_lr.train.presets import get_preset
from blockwise_lr.train.ratio_text import parse_ratios

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from joint_rule import joint_ratios

FIRST_LR = 6e-4
OPTIMIZER = "AdamW 0.9 0.95 eps 1e-8, decay 0.1 coupled, clip 1.0, bf16 autocast on a GPU, cosine to base/20, one floor"


class Run(NamedTuple):
    """One run: ratios as text, base learning rate, warm-up as a part of the run, number of steps."""

    arm: str
    base_lr: float
    warmup: float
    steps: int

    @classmethod
    def parse(cls, text: str) -> Run:
        """Read RATIOS:BASE_LR:WARM_UP:STEPS."""
        try:
            arm, base_lr, warmup, steps = text.rsplit(":", 3)
            return cls(arm, float(base_lr), float(warmup), int(steps))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no run; expected RATIOS:BASE_LR:WARM_UP:STEPS, such as uniform:1.2e-3:0.2:1000"
            ) from None


def main() -> None:
    """Make the measured run, then the searches, then the other runs."""
    options = parse()
    shape = get_preset("llama-134m-minipile").model
    if options.tiny:
        shape = replace(shape, hidden_size=32, layers=1, heads=2, vocab_size=512, context=16)
    data = (options.data / "train.bin").read_bytes()
    setting = {
        "shape": asdict(shape),
        "rows": ROWS,
        "optimizer": OPTIMIZER,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else options.device,
        "torch": torch.__version__,
        "text_sha256": hashlib.sha256(data).hexdigest(),
        "seed": 0,
    }
    results = Results(options.out, setting)
    end = time.monotonic() + options.budget_seconds
    model = Llama(
        shape,
        options.data,
        device=options.device,
        compiled=not options.tiny,
        measured_rows=2 if options.tiny else 8,
    )
    study = Study(model, results, end)
    if options.measure:
        study.result(options.measure, measure=True)
    for arm in options.search:
        # Block ratios of these sizes need a lower base rate: begin at a quarter of uniform's.
        first = FIRST_LR if arm == "uniform" else study.best("uniform", options.steps, FIRST_LR) / 4
        study.search(arm, first, options.warmup, options.steps)
    for run in options.runs:
        study.result(run)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train.bin and val.bin")
    parser.add_argument("--out", type=Path, required=True, help="the results, written after every run")
    parser.add_argument("--runs", type=Run.parse, nargs="+", default=[], metavar="RUN")
    parser.add_argument("--measure", type=Run.parse, metavar="RUN", help="measure along this run")
    parser.add_argument("--search", nargs="+", default=[], metavar="RATIOS", help="double or halve the rates")
    parser.add_argument("--steps", type=int, default=240, help="of the runs of --search")
    parser.add_argument("--warmup", type=float, default=0.15, help="of the runs of --search")
    parser.add_argument(
        "--budget-seconds", type=float, default=math.inf, help="begin no run that lasts longer"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="width 32, not compiled: to try the script")
    options = parser.parse_args()
    for name in ("train.bin", "val.bin"):
        if not (options.data / name).is_file():
            parser.error(f"--data: {options.data} has no {name}; expected uint16 tokens of GPT-2 in it")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here; use --device cpu --tiny to try the script")
    return options


class Results:
    """The runs that have ended, in a file.

    Raises:
        SystemExit: the file holds runs of another setting.
    """

    def __init__(self, path: Path, setting: Mapping[str, Any]) -> None:
        self.path = path
        self.values: dict[str, Any] = {**setting, "date": str(datetime.date.today()), "runs": []}
        if path.exists():
            self.values = json.loads(path.read_text(encoding="utf-8"))
            for name, value in setting.items():
                if self.values.get(name) != value:
                    raise SystemExit(
                        f"{path} holds runs with {name} {self.values.get(name)!r}, and this one has {value!r}; "
                        "give another file as --out"
                    )

    def find(self, run: Run, ratios: Mapping[str, float]) -> dict[str, Any] | None:
        """Return the result of a run, or None."""
        wanted = {**run._asdict(), "ratios": ratios}
        same = (one for one in self.values["runs"] if all(one[key] == wanted[key] for key in wanted))
        return next(same, None)

    def add(self, row: dict[str, Any]) -> None:
        """Write the file with one run more."""
        self.values["runs"].append(row)
        write_json_atomic(self.path, self.values)


@dataclass
class Study:
    """Runs of one model until the time is over.

    Args:
        model: the model.
        results: what is known.
        end: ``time.monotonic()`` at which every run must have ended.
    """

    model: Llama
    results: Results
    end: float
    seconds_a_step: float = 0.0
    seconds_evaluating: float = 0.0

    def result(self, run: Run, *, measure: bool = False, curve_points: int = 20) -> dict[str, Any] | None:
        """Return the result of a run: train it unless it is known. None: there is no time left for it."""
        ratios = self._ratios(run.arm)
        named = {block.value: ratio for block, ratio in resolve_ratios(ratios).items()}
        found = self.results.find(run, named)
        if found is not None and ("directional" in self.results.values or not measure):
            return found
        if not self.seconds_a_step:
            self._time_a_step()
        needed = 1.1 * run.steps * self.seconds_a_step + 3 * self.seconds_evaluating
        if time.monotonic() + needed > self.end:
            print(f"no time left for {run}", flush=True)
            return None
        settings = {"warmup": run.warmup, "steps": run.steps}
        row = self.model.run(ratios, run.base_lr, **settings, measure=measure, curve_points=curve_points)
        for name in ("sharpness", "directional"):
            if name in row:
                self.results.values[name] = row.pop(name)
        row = {**run._asdict(), "ratios": named, **row}
        self.results.add(row)
        print(f"{run} tune {row['tune']} val {row['val']} {row['seconds']} s", flush=True)
        return row

    def search(self, arm: str, first: float, warmup: float, steps: int) -> None:
        """Find the best base rate of an arm by its loss on "tune"."""

        def loss_at(base_lr: float) -> float | None:
            row = self.result(Run(arm, base_lr, warmup, steps), curve_points=0)
            return None if row is None else tune_loss(row)

        best = bracket(first, loss_at)
        print(f"{arm}: best base learning rate {best}", flush=True)

    def best(self, arm: str, steps: int, otherwise: float) -> float:
        """Return the best base rate of the arm's runs of so many steps."""
        runs = [run for run in self.results.values["runs"] if (run["arm"], run["steps"]) == (arm, steps)]
        return float(min(runs, key=tune_loss)["base_lr"]) if runs else otherwise

    def _ratios(self, arm: str) -> Mapping[Block, float]:
        if arm != "own":
            try:
                return parse_ratios(arm)
            except ValueError as error:
                raise SystemExit(str(error)) from None
        reports = self.results.values.get("directional")
        if not reports:
            raise SystemExit('"own" needs a measurement: add --measure uniform:6e-4:0.15:240')
        return joint_ratios([DirectionalReport.from_dict(one) for one in reports])[0]

    def _time_a_step(self) -> None:
        """Compile, then time ten steps and the evaluations at the end of a run."""
        self.model.run({}, 1e-4, warmup=0.5, steps=2, curve_points=0)
        began = time.monotonic()
        found = self.model.run({}, 1e-4, warmup=0.5, steps=10, curve_points=0)
        self.seconds_a_step = float(found["seconds"]) / 10
        self.seconds_evaluating = time.monotonic() - began - float(found["seconds"])


def tune_loss(row: Mapping[str, Any]) -> float:
    """Return the loss that chooses between runs; infinite for a run that diverged."""
    return math.inf if row["tune"] is None else float(row["tune"])


if __name__ == "__main__":
    main()
