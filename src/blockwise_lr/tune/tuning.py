"""Tune the ratios of a model from start to end: check, estimate, search, and report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blockwise_lr.blocks import Block
from blockwise_lr.compare.comparison_progress import format_seconds
from blockwise_lr.compare.execute import available_cores
from blockwise_lr.compare.time_estimate import search_seconds, seconds_per_step
from blockwise_lr.data.prepare import prepare_data
from blockwise_lr.errors import UserError
from blockwise_lr.train.build_model import count_parameters
from blockwise_lr.train.checks import check_config
from blockwise_lr.tune.proxy import describe_size
from blockwise_lr.tune.samplers import make_sampler
from blockwise_lr.tune.search import check_folder, check_workers, run_search
from blockwise_lr.tune.search_findings import build_content
from blockwise_lr.tune.search_plan import SearchPlan
from blockwise_lr.tune.search_progress import SearchProgress
from blockwise_lr.tune.search_report import TUNE, write_results
from blockwise_lr.tune.trial_store import TrialStore
from blockwise_lr.tune.worker_pool import COMMAND


def tune(
    plan: SearchPlan,
    out: Path,
    *,
    workers: int,
    command: str,
    progress: SearchProgress | None = None,
    worker: Sequence[str] = COMMAND,
) -> dict[str, Any]:
    """Search the ratios of a plan, and write ratios.json, tune.json, report.md, report.html and figures into `out`.

    Called again with the same `out`, it continues an interrupted search.

    Args:
        plan: the search.
        out: its folder, created if missing.
        workers: number of trials in parallel.
        command: the command line that repeats the search, for the report.
        progress: where to show progress. Default: standard output.
        worker: the command line of a worker process, for tests.

    Returns:
        The content of tune.json; see `build_content` for its keys.

    Raises:
        UserError: the settings are invalid, a trial failed, or `out` holds another search or the report of another
            command.
    """
    check_workers(workers)
    progress = progress or SearchProgress()
    space = plan.space(plan.blocks())
    make_sampler(plan.sampler_name, space)  # raises an error for an unknown sampler or a missing package
    for point in plan.ratio_start(space, plan.uniform_start()[0]):
        check_config(plan.config(point))
    check_folder(plan, out)
    for line in describe_plan(plan, workers):
        progress.print_line(line)
    store = TrialStore(out / "trials")
    left = plan.trials + 2 * (plan.repeats - 1) - sum(r.order is not None for r in store.records.values())
    if left > 0:
        model = plan.model
        prepare_data(plan.base.data, vocab_size=model.vocab_size, context=model.context, progress=True)
        progress.print_line(estimate(plan, left, workers))
    store = run_search(plan, out, workers, progress, worker=worker)
    about = _environment(out, store)
    date = _date(out)
    content = build_content(plan, store, out, command=command, about=about, date=date)
    return write_results(content, out)


def describe_plan(plan: SearchPlan, workers: int) -> list[str]:
    """Return what the search is going to do, in lines."""
    model, blocks = plan.model, plan.blocks()
    outside = sum(count for block, count in blocks.items() if block not in (Block.EMB, Block.HEAD))
    total = count_parameters(model)
    stands_for = "the model itself" if model == plan.base.model else f"for {describe_size(plan.base.model)}"
    searched = ", ".join(block.upper() for block in plan.space(blocks).blocks)
    rule = plan.early_end
    early = (
        "every run goes to its end"
        if rule is None
        else f"a run that is {rule.margin:g} nats behind after {rule.share:.0%} of its steps ends"
    )
    return [
        f"proxy: {model.family} {describe_size(model)} ({stands_for}), {total:,} parameters, {outside:,} of them "
        "outside embedding and head",
        f"trials: {plan.trials} runs of {plan.base.steps:,} steps, {workers} at a time; {early}",
        f"first, {plan.uniform_trials} runs tune one learning rate for all blocks; then, "
        f"{plan.ratio_trials} search the ratios of {searched} ({plan.sampler_name})",
        f"at the end, the best trial and the best uniform one run with {plan.repeats} seeds in all",
    ]


def estimate(plan: SearchPlan, runs: int, workers: int) -> str:
    """Measure a few steps, and return how long the search takes."""
    config = plan.config(plan.uniform_start()[0])
    threads = max(1, available_cores() // workers)
    per_step = seconds_per_step(config, threads=threads)
    seconds = search_seconds(per_step, steps=plan.base.steps, runs=runs, workers=workers)
    return f"estimate: about {format_seconds(seconds)} for {runs} runs ({per_step:.3f} s a step, measured just now)"


def _environment(out: Path, store: TrialStore) -> dict[str, Any]:
    """Return where the trials ran, from the configuration of the first."""
    for _, record in sorted(store.records.items()):
        path = out / "runs" / record.name / "config.json"
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            return {key: facts.get(key) for key in ("hardware", "versions", "git_commit", "data")}
        except (OSError, ValueError):
            continue
    raise UserError(f"no run in {out / 'runs'} has its config.json; choose another --out, and search again")


def _date(out: Path) -> str:
    """Return the date of the results that exist, if no trial is newer; otherwise now."""
    newest = max(path.stat().st_mtime for path in (out / "trials").glob("*.json"))
    path = out / TUNE
    if path.exists() and path.stat().st_mtime > newest:
        return str(json.loads(path.read_text(encoding="utf-8"))["date"])
    return datetime.now(UTC).isoformat(timespec="seconds")
