"""Writing a comparison's reports: compare.json, report.md, report.html and the figures."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from blockwise_lr.compare import tables
from blockwise_lr.compare.arms import Arm
from blockwise_lr.compare.execute import Runner, run_all, train_command
from blockwise_lr.compare.figures import Drawn, draw_figures
from blockwise_lr.compare.findings import build_content
from blockwise_lr.compare.plan import Plan
from blockwise_lr.compare.results import read_results
from blockwise_lr.compare.run_bars import ComparisonProgress, format_seconds
from blockwise_lr.errors import UserError
from blockwise_lr.extras import check, missing
from blockwise_lr.files import write_json_atomic, write_text_atomic
from blockwise_lr.train.config import OptimConfig, TrainConfig
from blockwise_lr.train.presets import Setting

REPORT_PACKAGES = ("scipy", "matplotlib", "jinja2")
"""What the report is computed, drawn and written with."""


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
    """Train every arm with every seed, and write compare.json, report.md, report.html and the figures into
    `out`.

    Called again with the same `out`, it runs only what is missing.

    Args:
        base: the run that all others vary; its steps are N.
        arms: the first is the baseline, trained for N and for 2N steps.
        seeds: of initial weights and data order; runs are paired by seed.
        base_lrs: base learning rates that every arm is tuned over, at the first seed; None: `tuned`.
        tuned: "optimizer:ratios:horizon" -> setting tuned beforehand, horizon "N" or "2N"; None
            (with `base_lrs` None): `base`'s own for every arm, which the report says is untuned.
        warmups: warm-ups, as shares of the steps, that every arm tries with each of `base_lrs`; None: `base`'s own.
        refine: whether every arm also tries the base learning rates a factor of sqrt 2 on either side of its best.
        out: the comparison's folder, made if missing.
        jobs: runs at the same time.
        command: the command line that repeats the comparison, for the report.
        progress: where progress is shown; None: standard output.
        runner: command line of a run, for tests and other launchers.

    Returns:
        The content of compare.json (DESIGN section 4; see `build_content` for the keys beyond it).

    Raises:
        UserError: the plan makes no sense, a run failed, `out` is in use, or a package that the report needs is
            missing.

    Example:
        >>> arms = [Arm.parse("adamw:uniform"), Arm.parse("adamw:paper")]
        >>> grid = [1e-3, 2e-3, 4e-3]
        >>> compare(base, arms, seeds=[0, 1, 2], base_lrs=grid, out="out", command="...")  # doctest: +SKIP
    """
    try:  # before any run: the report needs them when all have been trained
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
    stored = {"plan": json.loads(json.dumps(plan.to_dict())), "command": command}
    done = _same_plan(out, stored["plan"])  # a finished comparison needs neither its text nor another date
    if not done:
        _check_runs(plan)
    run_all(plan, out, jobs, progress, runner=runner)
    if not done:
        stored["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_json_atomic(out / "plan.json", stored)
    return render(out)


def _check_runs(plan: Plan) -> None:
    """Refuse now what every run of an arm would refuse, each in a process of its own."""
    from blockwise_lr.data.nanogpt import find_bins
    from blockwise_lr.data.sources import open_source
    from blockwise_lr.train.checks import check_config  # not at the top: it brings transformers

    runs = plan.tuning_runs() or plan.final_runs(plan.choose({}))
    for run in {run.series.arm: run for run in runs}.values():
        try:
            check_config(run.config)
        except UserError as error:
            raise UserError(f"arm {run.series.arm.name!r}: {error}") from None
    if find_bins(plan.base.data.data) is None:
        open_source(plan.base.data)


def _same_plan(out: Path, plan: Mapping[str, Any]) -> bool:
    path = out / "plan.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["plan"] == plan


def render(out: str | Path) -> dict[str, Any]:
    """Rebuild every report in `out` from plan.json and the runs on the disk, without running anything.

    Returns:
        The content of compare.json.

    Raises:
        UserError: there is no comparison in `out`, or runs of it are missing.
    """
    out = Path(out)
    try:
        stored = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{out} holds no comparison (no plan.json); run a compare command with --out {out}"
        ) from None
    results = read_results(Plan.from_dict(stored["plan"]), out)
    content = build_content(results, out, command=stored["command"], date=stored["date"])
    content = cast("dict[str, Any]", json.loads(json.dumps(content, allow_nan=False)))  # as in the file
    figures = draw_figures(results, content, out)
    write_text_atomic(out / "report.md", _markdown(content, figures))
    write_text_atomic(out / "report.html", _html(content, figures))
    write_json_atomic(out / "compare.json", content)  # last: who finds it finds the reports
    return content


def _with_own_settings(optim: Mapping[str, Any], optimizers: set[str]) -> dict[str, Any]:
    """The settings with what each optimizer brings itself, spelled out where the arms have several."""
    own = {}
    for name in sorted(optimizers):
        # One from elsewhere may not be installed where a report is drawn anew.
        with contextlib.suppress(UserError):
            own[name] = dataclasses.asdict(OptimConfig(optimizer=name).resolved())
    spelled = dict(optim)
    for key in ("beta1", "beta2", "eps", "weight_decay"):
        if optim.get(key) is None:
            values = {name: settings[key] for name, settings in own.items()}
            same = len(set(values.values())) == 1
            each = ", ".join(
                f"{name} {'none' if v is None else format(v, 'g')}" for name, v in values.items()
            )
            spelled[key] = next(iter(values.values())) if same else each
    return spelled


def _sections(content: Mapping[str, Any]) -> dict[str, tables.Table]:
    config = content["config"]
    tuned = {"base_lr", *(("warmup_fraction", "warmup_steps") if tables.warmups_differ(content) else ())}
    shared = _with_own_settings(config["optim"], {arm["optimizer"] for arm in content["arms"].values()})
    optim = {k: v for k, v in shared.items() if k not in {"optimizer", "ratios"} | tuned}
    run = {
        "preset": content["preset"],
        "steps N": f"{content['steps']:,}",
        "seeds": ", ".join(map(str, content["seeds"])),
        "base learning rate": _how_tuned(content),
        "sequences a step (each process)": config["batch_size"] * config["accumulation"],
        "precision": config["precision"],
        "date": content["date"],
        "training time, summed over runs": format_seconds(content["seconds"]),
    }
    return {
        "comparisons": tables.comparisons_table(content),
        "arms": tables.arms_table(content),
        "run": tables.facts_table("Run", run),
        "model": tables.facts_table("Model", config["model"]),
        "optim": tables.facts_table("Optimizer and schedule, shared by all arms", optim),
        "data": tables.facts_table("Text", _as_facts("data", content["data"] or config["data"])),
        "hardware": tables.facts_table("Hardware", _as_facts("machine", content["hardware"])),
        "versions": tables.facts_table(
            "Software", {**_as_facts("versions", content["versions"]), "git commit": content["git_commit"]}
        ),
        "runs": tables.runs_table(content),
    }


def _how_tuned(content: Mapping[str, Any]) -> str:
    if content["base_lrs"] is not None:
        grid = ", ".join(f"{lr:g}" for lr in content["base_lrs"])
        if content["warmups"] is not None:
            grid += f" with warm-ups of {', '.join(f'{warmup:.0%}' for warmup in content['warmups'])}"
        if content["refined"]:
            grid += ", then a factor of √2 to either side of the best,"
        chosen = f"over {grid} with seed {content['seeds'][0]}, chosen by the tune loss"
        if at_edge := content.get("at_edge"):
            return f"every arm tried {chosen}; at the edge of the grid, so not tuned: {', '.join(at_edge)}"
        return f"every arm tuned {chosen}"
    if content["tuned"]:
        return "tuned beforehand for every arm and horizon; comes with the preset"
    return "not tuned"


def _as_facts(name: str, value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {name: value}


def _markdown(content: Mapping[str, Any], figures: Mapping[str, list[Drawn]]) -> str:
    escape, sections = tables.escape_markdown, _sections(content)

    def images(group: str, alt: str) -> list[str]:
        return [f"![{alt}]({figure.name}.png)" for figure in figures[group]]

    def section(key: str) -> list[str]:
        table = sections[key]
        return [f"### {escape(table.title)}", tables.markdown_table(table)] if table.rows else []

    fence = "`" * max(3, _longest_run_of_backticks(content["command"]) + 1)
    parts = [
        f"# Comparison: {escape(content['preset'])}, {content['steps']:,} steps",
        *[f"**{escape(sentence)}**" for sentence in content["answer"]],
        "\n".join(f"- {escape(warning)}" for warning in content["warnings"]),
        "## Loss",
        *images("overview", "Validation loss of every arm"),
        *images("comparisons", "Validation loss with loss gap and speed-up"),
        *section("comparisons"),
        *section("arms"),
        *(["## Choice of the base learning rate", *images("tuning", "Tune loss against base learning rate")]
          if content["tuning"] else []),
        "## Learning rate of every block",
        *images("lr", "Learning rate of every block, and ratios that move, over the steps"),
        "## What was run",
        *(part for key in ("run", "model", "optim", "data", "hardware", "versions") for part in section(key)),
        *section("runs"),
        "## How to repeat it",
        f"{fence}\n{content['command']}\n{fence}",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _longest_run_of_backticks(text: str) -> int:
    return max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)


def _html(content: Mapping[str, Any], figures: Mapping[str, list[Drawn]]) -> str:
    try:
        import jinja2
    except ModuleNotFoundError:
        raise UserError(str(missing("report.html needs", "jinja2", "report"))) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    # As an image, a figure's ids cannot collide with another's, and nothing in it can run.
    images = {
        group: [f"data:image/svg+xml;base64,{base64.b64encode(figure.svg).decode()}" for figure in drawn]
        for group, drawn in figures.items()
    }
    return environment.get_template("report.html.j2").render(
        c=content, tables=_sections(content), images=images
    )
