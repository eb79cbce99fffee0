"""The numbers in the presets are those of the committed results."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from blockwise_lr import Block
from blockwise_lr.directional.directional_report import reports_of
from blockwise_lr.optim.ratios import MEASURED_RATIOS, NAMED_RATIOS, QUICKSTART_RATIOS, resolve_ratios
from blockwise_lr.train.config import config_from_dict, identity
from blockwise_lr.train.presets import Setting, arms_of, get_preset, tuned_settings
from blockwise_lr.train.ratio_text import parse_ratios

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "studies"
RATIO_RULES, QUICKSTART = STUDIES / "2026-11-ratio-rules", STUDIES / "2026-11-quickstart-ratios"
COMPARE = json.loads((QUICKSTART / "data" / "compare.json").read_text())
STUDY = json.loads((RATIO_RULES / "data" / "llama-2m" / "compare.json").read_text())
SEARCH = json.loads((QUICKSTART / "data" / "search.json").read_text())


def test_the_quickstarts_ratios_and_settings_are_those_that_the_search_found():
    assert resolve_ratios(SEARCH["ratios"]["best"]) == resolve_ratios(QUICKSTART_RATIOS)
    optim = get_preset("quickstart").optim.resolved()
    searched = {
        name: value for name, value in SEARCH["baseline"]["best"].items() if name != "warmup_fraction"
    }
    assert {name: getattr(optim, name) for name in searched} == searched
    uniform = tuned_settings(get_preset("quickstart"))[
        "adamw:uniform:N"
    ]  # a later study tuned the warm-up, too
    assert (optim.base_lr, optim.warmup_fraction) == (uniform.base_lr, uniform.warmup_fraction)


def test_the_measured_ratios_are_near_both_of_the_measurements_that_they_stand_for():
    tried = json.loads((RATIO_RULES / "data" / "trials.json").read_text())
    for run in ("llama-2m-1e-3", "llama-2m-4e-3"):
        along = {Block(block): ratio for block, ratio in tried["along"][run]["found"].items()}
        assert set(along) == set(MEASURED_RATIOS)
        for block, ratio in MEASURED_RATIOS.items():
            assert 1 / 2.6 < ratio / along[block] < 2.6


def default_runs(ratios: str) -> list[dict]:
    """The runs at seed 0 of one set of ratios in the study of the default ones: points with their losses."""
    runs = json.loads((STUDIES / "2026-11-default-ratios" / "data" / "runs.json").read_text())["runs"]
    return [
        {**run, **run["point"]}
        for run in runs
        if run["point"]["ratios"] == ratios and not run["point"].get("seed")
    ]


def test_both_sides_were_searched_with_as_many_runs():
    assert len(SEARCH["ratios"]["runs"]) == len(SEARCH["baseline"]["runs"])


def test_the_quickstarts_settings_are_the_best_of_the_committed_grid():
    named = {name: resolve_ratios(ratios) for name, ratios in NAMED_RATIOS.items()}
    found = {}
    for name, arm in STUDY["arms"].items():
        runs = [run for run in STUDY["tuning"] if run["arm"] == name]
        tried = {Setting(run["base_lr"], run["warmup_fraction"]): run["tune_loss"] for run in runs}
        if (ratios := arm["ratios"]) != "auto":
            ratios = next((n for n, r in named.items() if r == resolve_ratios(parse_ratios(ratios))), None)
        if ratios is None:
            continue  # an arm of the study that is no preset's
        found[f"{arm['optimizer']}:{ratios}:{'2N' if name.endswith('2N') else 'N'}"] = min(
            tried, key=tried.get
        )
    found["adamw:half:N"] = found["adamw:uniform:N"]  # nothing but the ratios changes
    tried = {Setting(p["base_lr"], p["warmup"]): p["tune_loss"] for p in default_runs("half")}
    assert tried[found["adamw:half:N"]] - min(tried.values()) < 0.005
    tuned = dict(tuned_settings(get_preset("quickstart")))
    assert tuned == {key: found[key] for key in tuned}
    assert {key.rpartition(":")[0] for key in tuned} == {*arms_of("quickstart"), "adamw:paper", "adamw:auto"}


@pytest.mark.parametrize(
    "study",
    [QUICKSTART / "data" / "compare.json", RATIO_RULES / "data" / "llama-2m" / "compare.json"],
    ids=["quickstart", "llama-2m"],
)
def test_the_committed_results_are_of_the_preset_as_it_is(study):
    ran = identity(config_from_dict(json.loads(study.read_text())["config"]))
    preset = identity(get_preset("quickstart"))
    differing = {name for name in preset if ran.get(name) != preset[name]}
    # Resolved; each arm has its own; and these runs began their warm-up at 0.
    tuned = {"optim.base_lr", "optim.ratios", "optim.warmup_fraction"}
    assert differing <= {"device", "precision", "optim.warmup_start", *tuned}


def test_tuned_learning_rates_are_not_used_for_other_settings():
    from dataclasses import replace

    preset = get_preset("quickstart")
    assert tuned_settings(replace(preset, device="cpu", precision="fp32", report_to="none")) is not None
    assert tuned_settings(replace(preset, steps=301)) is None
    assert tuned_settings(replace(preset, model=replace(preset.model, layers=5))) is None


def test_the_numbers_on_the_page_are_those_of_the_data():
    text = (QUICKSTART / "README.md").read_text()
    for comparison in COMPARE["comparisons"]:
        gap = comparison["loss_gap"]
        assert f"{abs(gap['mean']):.3f}" in text
        low, high = gap["ci95"]
        assert f"({low:.3f} to {high:.3f})" in text
        assert f"{comparison['speedup']['value']:.2f}x" in text
    for arm in COMPARE["arms"].values():
        losses = [seed["terminal_val_loss"] for seed in arm["seeds"]]
        assert f"{sum(losses) / len(losses):.3f}" in text


def test_what_lies_beyond_the_edges_of_the_search_is_on_the_page():
    text = (QUICKSTART / "README.md").read_text()
    runs = json.loads((QUICKSTART / "data" / "edges.json").read_text())["runs"]
    losses = {json.dumps(run["point"], sort_keys=True): run["tune_loss"] for run in runs}
    for loss in losses.values():
        assert f"{loss:.3f}" in text
    uniform = losses['{"ratios": "uniform"}']
    best = min(loss for point, loss in losses.items() if '"uniform"' in point)
    searched = losses['{"ratios": "quickstart"}']
    for nats in (uniform - searched, uniform - best, best - searched):
        assert f"{nats:.3f}" in text


def test_the_pages_of_the_ratios_study_are_made_from_its_data(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RATIO_RULES))
    from rules_report import write_report

    shutil.copytree(RATIO_RULES, tmp_path, ignore=shutil.ignore_patterns("*.png", "*.gz"), dirs_exist_ok=True)
    write_report(tmp_path)
    for page in ("README.md", "details.md"):
        assert (tmp_path / page).read_text() == (RATIO_RULES / page).read_text()


def test_the_table_of_the_readme_is_that_of_the_ratios_study():
    page, readme = (RATIO_RULES / "README.md").read_text(), (ROOT / "README.md").read_text()
    columns = dict(
        zip(("llama-600k", "gpt2-1m", "llama-2m", "gpt2-4m", "llama-5m"), range(2, 7), strict=True)
    )
    (header,) = [line for line in page.splitlines() if line.startswith("| rule | gpt2-1m |")]
    for rule in ("paper", "measured", "own"):
        (row,) = [line.split("|") for line in page.splitlines() if line.startswith(f"| {rule} | +")]
        (shown,) = [line.split("|") for line in readme.splitlines() if line.startswith(f"| `{rule}` |")]
        for name, cell in zip(header.split("|")[2:-1], row[2:-1], strict=True):
            place = columns.get(name.split()[0])
            if place is not None:  # the README rounds the gap and its interval to two digits
                assert numbers(shown[place]) == pytest.approx(numbers(cell), abs=0.0056)


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"[+-]?\d\.\d+", cell)]


def test_the_answer_of_the_ratios_study_is_what_the_data_say():
    answer = (RATIO_RULES / "README.md").read_text().split("## Answer")[1].split("\n\n")[0]
    studies = {
        path.parent.name: json.loads(path.read_text()) for path in RATIO_RULES.glob("data/*/compare.json")
    }
    for name in ("llama-5m", "llama-2m", "gpt2-1m"):
        added = json.loads((RATIO_RULES / "data" / name / "added-rules.json").read_text())
        studies[name]["comparisons"] += added["comparisons"]
    won = {
        rule: {name: gap_of(study, rule) for name, study in studies.items()} for rule in ("measured", "paper")
    }
    assert len(studies) == 6
    assert f"{min(won['measured'].values()):.3f} to {max(won['measured'].values()):.3f} nats" in answer
    gpt2 = max(gap for name, gap in won["paper"].items() if name.startswith("gpt2"))
    llama = max(gap for name, gap in won["paper"].items() if name.startswith("llama"))
    assert f"{gpt2:.3f} nats" in answer
    assert f"{-llama:.3f} nats" in answer


def gap_of(study: dict, rule: str) -> float:
    return next(each["loss_gap"]["mean"] for each in study["comparisons"] if each["arm"] == rule)


def test_what_is_said_of_the_blocks_along_a_uniform_run_is_what_was_measured():
    reports = reports_of(
        json.loads((RATIO_RULES / "data" / "near-best-rate" / "directional.json").read_text())
    )
    alone = sum(slope.factor > 1 for report in reports for slope in report.values())
    held = {b.value: sum(report[b].factor_beside < 1 for report in reports) for b in reports[0]}
    assert (len(reports), alone) == (20, 102)
    assert held == {"emb": 2, "qk": 10, "vo": 16, "ffn": 11, "norm": 3, "head": 0}
    late = [report for report in reports if report.step >= 105]
    shown = {"norm": (14, 544), "emb": (2.4, 36), "head": (1.4, 29)}
    for block, bounds in shown.items():
        found = [report[block].factor_beside for report in late]
        assert (min(found), max(found)) == pytest.approx(bounds, rel=0.03)
    details = (RATIO_RULES / "details.md").read_text()
    assert "102 of " in details
    assert "at 16 of its 20 points, FFN at 11 and QK at 10" in details
    page = (ROOT / "docs" / "concepts" / "ratios.md").read_text()
    assert "102 of 120 points" in page
    for block, times in held.items():
        ahead = sum(report[Block(block)].factor > 1 for report in reports)
        assert f"| {block.upper()} | 20 | {ahead} | {times} |" in page


def test_the_ratios_of_each_block_alone_that_were_tried_are_those_that_were_measured():
    reports = reports_of(json.loads((RATIO_RULES / "data" / "llama-2m" / "directional.json").read_text()))
    logs = {
        block: sum(math.log(min(max(report[block].factor, 0.1), 20)) for report in reports) / len(reports)
        for block in reports[0]
    }
    alone = {block: math.exp(log - logs[Block.FFN]) for block, log in logs.items()}
    tried = json.loads((RATIO_RULES / "data" / "trials.json").read_text())["tried"]
    found = {t["point"]["ratios"] for t in tried if t["point"]["ratios_from"] == "own, each block alone"}
    assert len(found) == 1
    assert resolve_ratios(parse_ratios(found.pop())) == pytest.approx(resolve_ratios(alone), rel=0.01)


def test_a_quarter_of_the_tuned_uniform_rate_stands_for_a_search(monkeypatch):
    """README and docs/concepts/ratios.md claim these bounds of every setting."""
    monkeypatch.syspath_prepend(str(RATIO_RULES))
    from rules_report import read_study, without_a_search

    studies = [read_study(path) for path in RATIO_RULES.glob("data/*/compare.json")]
    found = [without_a_search(study, rule) for study in studies for rule in ("measured", "auto")]
    lost, won = zip(*(each for each in found if each is not None))
    assert len(lost) >= 10
    assert max(lost) <= 0.037
    assert min(won) >= 0.175


def test_the_pages_of_the_optimizer_study_are_made_from_its_data(tmp_path, monkeypatch):
    study = STUDIES / "2026-11-optimizers"
    monkeypatch.syspath_prepend(str(study))
    from optimizers_report import ADAMW, write_report

    copy = tmp_path / study.name
    shutil.copytree(study, copy, ignore=shutil.ignore_patterns("*.png", "*.gz"))
    (tmp_path / ADAMW).parent.mkdir(parents=True)
    shutil.copy(STUDIES / ADAMW, tmp_path / ADAMW)
    write_report(copy)
    for page in ("README.md", "details.md"):
        assert (copy / page).read_text() == (study / page).read_text()


def test_the_page_of_the_default_ratios_is_made_from_its_data(monkeypatch):
    study = STUDIES / "2026-11-default-ratios"
    monkeypatch.syspath_prepend(str(study))
    from tune_default import load, page

    assert (study / "README.md").read_text() == page(load())


def test_what_the_readme_and_the_choice_of_ratios_say_of_the_default_is_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES / "2026-11-default-ratios"))
    from tune_default import (
        EMBEDDING,
        UNCHANGED,
        Point,
        by_seed,
        gap,
        load,
        longest,
        said,
        spoken,
        unchanged,
        won,
    )

    choice, readme, overview = (
        " ".join((ROOT / name).read_text().split())
        for name in ("docs/how-to/choose-ratios-and-learning-rate.md", "README.md", "studies/README.md")
    )
    uniform, half = unchanged(longest())
    assert f"{uniform['val_loss']:.3f} and {half['val_loss']:.3f}, both at 4e-3" in choice
    assert f"and {uniform['val_loss'] - half['val_loss']:.3f} over 4 800 steps, one seed" in overview
    runs = load()
    default, alone = won(runs, UNCHANGED), won(runs, EMBEDDING[0])
    assert f"At 300 steps `half` wins {spoken(runs, UNCHANGED)} with nothing else changed" in choice
    assert f"{spoken(runs, UNCHANGED)} over 300 steps with nothing else changed" in overview
    assert f"alone: {alone.mean:.3f})" in overview
    low, high = default.ci95
    assert f"it wins {default.mean:.2f} nats ({low:.2f} to {high:.2f}) with nothing else changed" in readme
    both = f"{alone.mean:.3f} nats with nothing else changed, where `half` wins {default.mean:.3f}"
    assert f"they win {both}" in choice
    low, high = gap(by_seed(runs, UNCHANGED), by_seed(runs, EMBEDDING[0])).ci95
    assert low < 0 < high  # the lead is not decided
    half_tuned = by_seed(runs, Point("half", 2.83e-3, 0.6))
    lead = said(gap(half_tuned, by_seed(runs, EMBEDDING[1])))
    assert (
        f"win {won(runs, EMBEDDING[1]).mean:.3f}, as much as `measured` and {lead} more than tuned `half`"
        in choice
    )


def test_the_table_of_measured_ratios_shows_what_was_measured():
    rows = {
        "| LLaMA, 0.6M": "llama-600k",
        "| LLaMA, 1.8M": "llama-2m",
        "| LLaMA, 1.8M, four times the steps": "four-times-steps",
        "| the same at 4e-3, near its best rate": "near-best-rate",
        "| GPT-2, 1.2M": "gpt2-1m",
    }
    page = (ROOT / "docs" / "concepts" / "ratios.md").read_text().splitlines()
    for start, name in rows.items():
        (row,) = [line for line in page if line.startswith(start + " |")]
        found = parse_ratios(str(RATIO_RULES / "data" / name / "directional.json"))
        expected = [found.get(Block(b)) for b in ("emb", "qk", "ffn", "vo", "norm", "head")]
        shown = [cell.strip() for cell in row.split("|")[2:-1]]
        assert shown == ["tied" if r is None else f"{r:.2g}" for r in expected]
