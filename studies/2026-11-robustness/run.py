"""How exact must each ratio be, and what is each block's ratio worth?

    python studies/2026-11-robustness/run.py --list                  # number of runs and minutes; trains nothing
    python studies/2026-11-robustness/run.py                         # quickstart: 1.8M parameters, 300 steps
    python studies/2026-11-robustness/run.py --model llama-600k      # 0.6M parameters, in half the time

Runs `blockwise-lr robustness` and `blockwise-lr ablation` one after the other. Runs that both need are trained once.
Finished runs are kept in data/MODEL/runs.tar.gz, so the same command continues after an interruption, from a fresh
clone too. Writes data/MODEL/robustness.json and data/MODEL/ablation.json; report.py makes the pages from them. Without
values, --base-lrs takes the preset's own learning rate, and nothing is tuned.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from kept_runs import call, kept

DATA = Path(__file__).parent / "data"
KINDS = ("robustness", "ablation")
MODELS = {"llama-600k": ("--hidden-size", "64", "--heads", "1"), "quickstart": ()}
"""Flags that make each model of the preset `quickstart`."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--list", action="store_true", help="print the number of runs and minutes; train nothing"
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="quickstart")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ratios", default="half")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument(
        "--base-lrs", nargs="*", default=["4e-3", "8e-3", "1.6e-2"],
        help="grid of ratios and of uniform, refined by sqrt 2 (default: %(default)s); without values: the preset's",
    )  # fmt: skip
    parser.add_argument("--warmups", nargs="*", default=["0.15", "0.6"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--jobs", default="0", help="runs in parallel (default: one a core)")
    parser.add_argument("--data", help="another text, as of train")
    parser.add_argument("--out", type=Path, default=Path("runs") / "robustness-study", help="runs, by model")
    return parser.parse_args(arguments)


def command(kind: str, given: argparse.Namespace) -> list[str]:
    """Return the arguments of `blockwise-lr` for one of the two sweeps."""
    grid = ["--base-lrs", *given.base_lrs, "--refine"] if given.base_lrs else []
    grid += ["--warmups", *given.warmups] if given.base_lrs and given.warmups else []
    return [
        kind, "quickstart", *MODELS[given.model], "--steps", str(given.steps), "--ratios", given.ratios,
        "--device", "cpu", "--seeds", *given.seeds, *grid, "--jobs", given.jobs,
        *(["--data", given.data] if given.data else []), "--out", str(given.out / given.model / kind),
    ]  # fmt: skip


def main() -> None:
    given = parse()
    for kind in given.kinds:
        print(shlex.join(["blockwise-lr", *command(kind, given)]), flush=True)
    if given.list:
        print("Runs that both need are counted twice:", flush=True)
        for kind in given.kinds:
            call([*command(kind, given), "--dry-run"])
        return
    data, out = DATA / given.model, given.out / given.model
    data.mkdir(parents=True, exist_ok=True)
    with kept(data / "runs.tar.gz", share_runs(out)):
        for kind in given.kinds:
            call(command(kind, given))
            shutil.copyfile(out / kind / f"{kind}.json", data / f"{kind}.json")


def share_runs(out: Path) -> Path:
    """Create the folder of runs that both sweeps of a model share, and return it."""
    runs = out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        (out / kind).mkdir(exist_ok=True)
        if not (out / kind / "runs").exists():
            (out / kind / "runs").symlink_to(Path("..") / "runs", target_is_directory=True)
    return runs


if __name__ == "__main__":
    main()
