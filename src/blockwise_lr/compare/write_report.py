"""Run a comparison, and write compare.json, report.md, report.html and the figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from blockwise_lr.compare.arms import Arm
from blockwise_lr.compare.comparison_progress import ComparisonProgress
from blockwise_lr.compare.execute import Runner, run_all, train_command
from blockwise_lr.compare.figures import draw_figures
from blockwise_lr.compare.findings import build_content
from blockwise_lr.compare.plan import Plan
from blockwise_lr.compare.report_text import html_report, markdown_report
from blockwise_lr.compare.results import read_results
from blockwise_lr.errors import UserError
from blockwise_lr.extras import check
from blockwise_lr.files import write_json_atomic, write_text_atomic
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.presets import Setting

REPORT_PACKAGES = ("scipy", "matplotlib", "jinja2")
"""The packages that the report needs."""

_REPORTING = ("compare", "robustness", "ablation", "scaling", "tune")
"""The commands that write report.md and report.html, and NAME.json after them."""


def compare(
    base: TrainConfig,
    arms: Sequence[Arm],
    *,
    seeds: Sequence[int],
    base_lrs: Sequence[float] | None = None,
    tuned: Mapping[str, Setting] | None = None,
    warmups: Sequence[float] | None = None,
    refine: bool = False,
    out: str | Path,
    jobs: int = 1,
    command: str,
    progress: ComparisonProgress | None = None,
    runner: Runner = train_command,
) -> dict[str, Any]:
    """Train every arm with every seed, and write compare.json, report.md, report.html and the figures into `out`.

    Called again with the same `out`, it trains only the missing runs.

    Args:
        base: the configuration that all runs share, except for what arms, seeds and tuning vary. Its steps are N.
        arms: the arms to compare. The first is the baseline, trained for N and for 2N steps.
        seeds: seeds of initial weights and data order; runs of different arms are paired by seed.
        base_lrs: base learning rates to tune every arm over, with the first seed. Default: use `tuned`.
        tuned: {"optimizer:ratios:horizon": setting that was tuned beforehand}, with horizon "N" or "2N". If both this
            and `base_lrs` are None, all arms use the learning rate of `base`, and the report says that nothing was
            tuned.
        warmups: warm-ups that every arm tries with each of `base_lrs`, as fractions of the steps. Default: that of
            `base`.
        refine: whether every arm also tries its best base learning rate divided by sqrt 2 and multiplied by sqrt 2.
        out: the comparison's folder, created if missing.
        jobs: number of runs in parallel.
        command: the command line that repeats the comparison, for the report.
        progress: where to show progress. Default: standard output.
        runner: returns the command line of a run, for tests and other launchers.

    Returns:
        The content of compare.json; see `build_content` for its keys.

    Raises:
        UserError: the settings are invalid, a run failed, `out` is in use or holds something else than a comparison,
            or a package that the report needs is missing.

    Example:
        >>> arms = [Arm.parse("adamw:uniform"), Arm.parse("adamw:paper")]
        >>> grid = [1e-3, 2e-3, 4e-3]
        >>> compare(base, arms, seeds=[0, 1, 2], base_lrs=grid, out="out", command="...")  # doctest: +SKIP
    """
    try:  # before training starts, since the report needs the packages only at the end
        check("compare needs", REPORT_PACKAGES)
    except ImportError as error:
        raise UserError(str(error)) from None
    plan = Plan(
        base=base,
        arms=tuple(arms),
        seeds=tuple(seeds),
        base_lrs=None if base_lrs is None else tuple(base_lrs),
        tuned=None if tuned is None else dict(tuned),
        warmups=None if warmups is None else tuple(warmups),
        refine=refine,
    )
    out = Path(out)
    check_no_other_report("compare", out)
    stored = {"plan": json.loads(json.dumps(plan.to_dict())), "command": command}
    done = _same_plan(out, stored["plan"])  # a repeated plan needs no checks, and keeps its date
    if not done:
        check_runs(plan)
    run_all(plan, out, jobs, progress, runner=runner)
    if not done:
        stored["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_json_atomic(out / "plan.json", stored)
    return render(out)


def check_no_other_report(command: str, out: Path) -> None:
    """Check that `out` holds no report of another command, which the report of `command` would replace.

    Raises:
        UserError: it holds one; the message names the file that shows it.
    """
    for other in _REPORTING:
        if other != command and (out / f"{other}.json").exists():
            raise UserError(
                f"{out} holds the report of {other} ({other}.json), and {command} would replace it; "
                "choose another --out"
            )


def check_runs(plan: Plan) -> None:
    """Check the configuration and text of the runs now, instead of failing later in every run's process.

    Raises:
        UserError: a run could not be trained; the message names its arm.
    """
    from blockwise_lr.data.nanogpt import find_bins
    from blockwise_lr.data.sources import open_source
    from blockwise_lr.train.checks import check_config  # imported here because it loads transformers

    runs = plan.tuning_runs() or plan.final_runs(plan.choose({}))
    for run in {run.series.arm: run for run in runs}.values():
        try:
            check_config(run.config)
        except UserError as error:
            raise UserError(f"arm {run.series.arm.name!r}: {error}") from None
    if find_bins(plan.base.data.data) is None:
        open_source(plan.base.data)


def _same_plan(out: Path, plan: Mapping[str, Any]) -> bool:
    """Return whether `out` holds a finished comparison of this plan."""
    path = out / "plan.json"
    return path.exists() and bool(_read_plan(path)["plan"] == plan)


def _read_plan(path: Path) -> dict[str, Any]:
    """Return the content of a comparison's plan.json.

    Raises:
        UserError: it belongs to a search, or to nothing that this package writes.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        stored = None
    expected = {"plan", "command", "date"}
    if not isinstance(stored, dict) or not expected <= stored.keys() or "identity" in stored:
        raise UserError(f"{path} is not the plan of a comparison; choose another --out")
    return stored


def render(out: str | Path) -> dict[str, Any]:
    """Rebuild the report in `out` from plan.json and the finished runs, without training anything.

    Args:
        out: the comparison's folder.

    Returns:
        The content of compare.json; see `build_content` for its keys.

    Raises:
        UserError: there is no comparison in `out`, it holds something else, or runs are missing.
    """
    out = Path(out)
    try:
        stored = _read_plan(out / "plan.json")
    except FileNotFoundError:
        raise UserError(
            f"{out} holds no comparison (no plan.json); run a compare command with --out {out}"
        ) from None
    results = read_results(Plan.from_dict(stored["plan"]), out)
    content = build_content(results, out, command=stored["command"], date=stored["date"])
    # The returned content must equal what reading the file gives, such as lists in place of tuples.
    content = cast("dict[str, Any]", json.loads(json.dumps(content, allow_nan=False)))
    figures = draw_figures(results, content, out)
    write_text_atomic(out / "report.md", markdown_report(content, figures))
    write_text_atomic(out / "report.html", html_report(content, figures))
    # compare.json is written last: its presence means that the reports are complete.
    write_json_atomic(out / "compare.json", content)
    return content
