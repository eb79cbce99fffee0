"""The work of `blockwise-lr sharpness`: measure a model or every checkpoint of a run; write JSON and figures."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import nn

from blockwise_lr.analysis.measure_settings import MeasureConfig
from blockwise_lr.analysis.measure_slopes import directional_reports, write_directional
from blockwise_lr.analysis.named_models import NamedModel, find_named_model
from blockwise_lr.blocks import Block, classify
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import TokenData, prepare_data
from blockwise_lr.directional import DirectionalReport
from blockwise_lr.directional.directional_figure import directional_run_table, shown_report
from blockwise_lr.directional.ratio_display import ratio_lines
from blockwise_lr.errors import UserError
from blockwise_lr.files import make_folder, write_json_atomic
from blockwise_lr.sharpness import SharpnessReport, measure_sharpness, plot
from blockwise_lr.train.environment import describe_environment
from blockwise_lr.train.quiet import quiet_libraries
from blockwise_lr.train.run_folder import check_same_text, missing_paths, remove_created
from blockwise_lr.train.run_sharpness import masked_batches, measure_batches
from blockwise_lr.train.settings import resolve_device

RESULT = "sharpness.json"


@quiet_libraries()
def measure_model(
    model: str,
    config: MeasureConfig,
    out: Path | None = None,
    *,
    command: str = "",
    console: Console | None = None,
) -> tuple[list[SharpnessReport] | list[DirectionalReport], Path]:
    """Measure the sharpness of a model in fp32, and write sharpness.json and the figures.

    The windows are spread evenly over the measure split of the text.

    Args:
        model: a preset (measured at initialisation), a run's folder (all its complete checkpoints are measured, on
            the run's own text), one checkpoint, or a Hugging Face folder or id.
        config: the settings of the measurement.
        out: folder for sharpness.json and the figures. Default: sharpness/ in the run's folder, otherwise
            runs/sharpness-NAME.
        command: the command line to record in sharpness.json.
        console: where to show progress. Default: stderr.

    Returns:
        The reports, earliest first, and the folder. With `config.directional` they are DirectionalReports.

    Raises:
        UserError: the model, the text or a setting cannot be used; the message says what to change.
    """
    console = console or Console(stderr=True)
    config.check()
    device = resolve_device(config.device)
    named = find_named_model(model, seed=config.seed)
    out = named.out if out is None else out
    data, batches = _batches(named, config, progress=console.is_terminal)
    made = missing_paths(out)
    make_folder(out)  # fails before the work if the folder cannot be created
    for reason in named.skipped:
        console.print(f"{reason}: passed over", highlight=False, soft_wrap=True, markup=False)
    about = {
        "model": named.name,
        "command": command,
        "initial_rms": _by_name(named.initial_scales or {}),
        **describe_environment(device),
        "data": data.describe(),
    }
    try:
        with _progress(console, named, config.batches) as show:
            if config.directional:
                slopes = directional_reports(named, batches, device, show)
                over_rms = lr_over_initial_rms(shown_report(slopes), named.initial_scales or {})
                write_directional(slopes, out, {**about, "lr_over_initial_rms": _by_name(over_rms)})
                _print_over_rms(shown_report(slopes).step, over_rms, console)
                return slopes, out
            reports = []
            for step, load in named.models:
                reports.append(_measure(load, batches, step, config, device, partial(show, step)))
                gc.collect()  # models hold reference cycles; without this, two would be in memory at once
        _write(reports, out, about, console)
    finally:
        remove_created(made)  # removes the new folders if they are still empty
    return reports, out


def lr_over_initial_rms(report: DirectionalReport, scales: Mapping[Block, float]) -> dict[Block, float]:
    """Return the learning rate of each block in a report over its scale before training."""
    return {block: slope.lr / scales[block] for block, slope in report.items() if block in scales}


def _print_over_rms(step: int | None, over_rms: Mapping[Block, float], console: Console) -> None:
    values = ", ".join(f"{block.value} {value:.2g}" for block, value in over_rms.items())
    text = f"step {step}: learning rate over the RMS of the weights before training: {values}"
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _by_name(values: Mapping[Block, float]) -> dict[str, float]:
    return {block.value: value for block, value in values.items()}


def tables_of(reports: Sequence[SharpnessReport] | Sequence[DirectionalReport]) -> list[Table]:
    """Return the tables that the command prints.

    Sharpness reports give the table of the last checkpoint. Directional reports give the table of the checkpoint at
    the highest learning rate and, for several checkpoints, one along the run.
    """
    slopes = [report for report in reports if isinstance(report, DirectionalReport)]
    if not slopes:
        return [reports[-1].table()]
    along = [directional_run_table(slopes)] if len(slopes) > 1 else []
    return [shown_report(slopes).table(), *along]


def lines_of(reports: Sequence[SharpnessReport] | Sequence[DirectionalReport]) -> list[str]:
    """Return the lines that the command prints below the tables: the ratios of directional reports."""
    return ratio_lines([report for report in reports if isinstance(report, DirectionalReport)])


def _batches(named: NamedModel, config: MeasureConfig, *, progress: bool) -> tuple[TokenData, list[Any]]:
    context = config.context or named.context
    if named.longest is not None and context > named.longest:
        raise UserError(
            f"--context is {context}; {named.name} takes windows of at most {named.longest} tokens"
        )
    text = _text(named, config)
    try:
        data = prepare_data(text, vocab_size=named.vocab_size, context=context, progress=progress)
    except UserError as error:  # this command has no --vocab-size to set
        raise UserError(str(error).partition(": set --vocab-size")[0]) from None
    if named.run is not None and text == named.data:
        check_same_text(named.run, data.describe())
    batch_size = config.batch_size or named.batch_size
    if named.masked:
        return data, masked_batches(data, context, config.batches, batch_size, config.seed)
    return data, measure_batches(data.measure, context, batches=config.batches, batch_size=batch_size)


def _text(named: NamedModel, config: MeasureConfig) -> DataConfig:
    """Return the text and its tokenizer: those of the run, unless others are given."""
    if named.run is not None and config.data is None and config.tokenizer is None:
        return named.data
    tokenizer = config.tokenizer or named.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{named.name} comes without a tokenizer (tokenizer.json): name the one it was trained with, "
            "--tokenizer FOLDER-or-id"
        )
    if config.data is None:
        return replace(named.data, tokenizer=tokenizer)
    return DataConfig(
        data=config.data, text_field=config.text_field, tokenizer=tokenizer, cache=named.data.cache
    )


def _measure(
    load: Callable[[], nn.Module],
    batches: Sequence[Any],
    step: int | None,
    config: MeasureConfig,
    device: str,
    on_batch: Callable[[int], None],
) -> SharpnessReport:
    model, overrides = load().to(device), config.overrides
    try:
        blocks = classify(model, overrides)
    except ValueError as error:
        raise UserError(f"{error}; on the command line: --blocks 'REGEX=BLOCK' ...") from error
    try:
        return measure_sharpness(
            model,
            batches,
            estimator=config.estimator,
            seed=config.seed,
            probes=config.probes,
            blocks=blocks,
            histogram=config.histogram,
            step=step,
            on_batch=on_batch,
        )
    except ValueError as error:  # such as non-finite logits, or windows without a masked token
        raise UserError(str(error)) from error


@contextmanager
def _progress(
    console: Console, named: NamedModel, batches: int
) -> Iterator[Callable[[int | None, int], None]]:
    """Show a progress bar over all batches of all checkpoints on a terminal, and one line per checkpoint elsewhere."""
    columns = (
        TextColumn("measuring {task.fields[what]}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("batches"),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=batches * len(named.models), what=named.name)
        measured: list[
            str
        ] = []  # checkpoints whose line is not printed yet: a measurement may fail after its batches

        def print_measured() -> None:
            while measured and not console.is_terminal:
                console.print(f"measured {measured.pop(0)}", highlight=False, soft_wrap=True, markup=False)

        def show(step: int | None, done: int) -> None:
            print_measured()
            what = named.name if step is None else f"{named.name}, step {step:,}"
            bar.update(task, advance=1, what=what)
            if done == batches:
                measured.append(what)

        yield show
        print_measured()


def _write(reports: Sequence[SharpnessReport], out: Path, about: dict[str, Any], console: Console) -> None:
    """Write sharpness.json (the last report; the others under "earlier") and the figures, replacing older ones."""
    *earlier, last = reports
    write_json_atomic(
        out / RESULT, {**last.to_dict(), "about": about, "earlier": [each.to_dict() for each in earlier]}
    )
    figures: dict[str, Callable[[Path], object] | None] = {
        "sharpness.png": partial(plot.plot_blocks, last),
        "layers.png": partial(plot.plot_layers, last),
        "density.png": partial(plot.plot_density, last) if last.histograms else None,
        "evolution.png": partial(plot.plot_evolution, reports) if earlier else None,
    }
    for name, draw in figures.items():
        (out / name).unlink(missing_ok=True)  # remove the figure of an earlier measurement
        if draw is not None:
            try:
                draw(out / name)
            except ValueError as error:
                console.print(f"{name} was not drawn: {error}", highlight=False, soft_wrap=True, markup=False)
