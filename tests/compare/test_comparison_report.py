import html.parser
import json
import re
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_comparison import BASE, synthetic_compare, synthetic_content

from blockwise_lr.compare import print_summary, render
from blockwise_lr.compare.tables import runs_table
from blockwise_lr.errors import UserError
from blockwise_lr.optim import resolve_ratios
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.presets import Setting
from blockwise_lr.tune.search import check_folder
from blockwise_lr.tune.search_plan import SearchPlan

TUNED = dict.fromkeys(("adamw:uniform:N", "adamw:uniform:2N", "adamw:paper:N"), Setting(2e-3))
HOSTILE = '<script>alert("$x$ & 1")</script>|`[a](b)'


class Page(html.parser.HTMLParser):
    """The tags of a page, its text, and whatever it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def table_rows(markdown: str) -> list[int]:
    return [len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")]


def test_compare_json_has_the_schema_of_the_design(tuned_comparison):
    out, returned = tuned_comparison
    content = json.loads((out / "compare.json").read_text())
    assert content == returned
    assert (content["preset"], content["steps"]) == ("quickstart", 60)
    assert list(content["arms"]) == ["uniform", "uniform 2N", "paper", "quickstart"]
    assert [arm["steps"] for arm in content["arms"].values()] == [60, 120, 60, 60]
    for arm in content["arms"].values():
        assert {"optimizer", "ratios", "base_lr", "steps", "seeds"} <= set(arm)
        assert [run["seed"] for run in arm["seeds"]] == [0, 1, 2]
        for run in arm["seeds"]:
            result = json.loads((out / run["run"] / "result.json").read_text())
            assert run["terminal_val_loss"] == result["terminal_val_loss"]
    assert [(c["arm"], c["against"]) for c in content["comparisons"]] == [
        ("paper", "uniform"),
        ("quickstart", "uniform"),
    ]
    for comparison in content["comparisons"]:
        low, high = comparison["loss_gap"]["ci95"]
        assert low < comparison["loss_gap"]["mean"] < high
        for key in ("speedup", "speedup_decayed"):
            assert comparison[key]["bound"] in ("exact", "at_least", "at_most")
            assert {"value", "ci95"} <= set(comparison[key])


def test_numbers_are_those_of_the_runs(tuned_comparison):
    _, content = tuned_comparison
    losses = {
        name: [run["terminal_val_loss"] for run in arm["seeds"]] for name, arm in content["arms"].items()
    }
    gap = sum(b - a for b, a in zip(losses["uniform"], losses["quickstart"])) / 3
    assert content["comparisons"][1]["loss_gap"]["mean"] == pytest.approx(gap)
    assert content["arms"]["quickstart"]["mean_terminal_val_loss"] == pytest.approx(
        sum(losses["quickstart"]) / 3
    )


def test_every_arms_rates_are_given_over_the_scales_that_its_blocks_start_with(tuned_comparison):
    out, content = tuned_comparison
    assert content["initial_rms"] == dict.fromkeys(("emb", "qk", "vo", "ffn", "head"), 0.02) | {"norm": 1.0}
    for arm in content["arms"].values():
        ratios = resolve_ratios(arm["ratios"])
        for block, value in arm["lr_over_initial_rms"].items():
            assert value == pytest.approx(arm["base_lr"] * ratios[block] / content["initial_rms"][block])
    report = (out / "report.md").read_text()
    emb = content["arms"]["paper"]["lr_over_initial_rms"]["emb"]
    assert f"| paper | {emb:.3g} |" in report.partition("### Peak learning rate over initial scale")[2]
    assert "Peak learning rate over initial scale" in (out / "report.html").read_text()


def test_every_run_of_the_grid_is_reported_and_one_of_each_arm_is_chosen(tuned_comparison):
    _, content = tuned_comparison
    assert len(content["tuning"]) == 4 * 5
    for name, arm in content["arms"].items():
        runs = [run for run in content["tuning"] if run["arm"] == name]
        assert [run["base_lr"] for run in runs] == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
        assert [run["base_lr"] for run in runs if run["chosen"]] == [arm["base_lr"]]
        assert min(runs, key=lambda run: run["tune_loss"])["chosen"]


def test_a_loss_and_a_win_are_stated_as_plainly_as_each_other(tuned_comparison):
    out, content = tuned_comparison
    win, lose = content["answer"]
    assert re.match(
        r"quickstart beats tuned uniform by 0\.\d+ nats after 60 steps \(95 % CI .* to .*, 3 seeds", win
    )
    assert re.match(r"paper LOSES to tuned uniform by 0\.\d+ nats after 60 steps", lose)
    assert "at most 1.00× between fully decayed runs" in lose
    page = Page((out / "report.html").read_text())
    for sentence in content["answer"]:
        assert sentence in page.text


def test_the_papers_speedup_comes_with_what_the_baseline_itself_scores(tuned_comparison):
    _, content = tuned_comparison
    assert content["baseline_against_itself"]["value"] > 1
    assert (
        f"the baseline against itself: {content['baseline_against_itself']['value']:.2f}×"
        in content["answer"][0]
    )


def test_the_report_needs_nothing_outside_itself(tuned_comparison):
    out, _ = tuned_comparison
    page = Page((out / "report.html").read_text())
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.tags.count("img") == 5  # all arms, two comparisons, tuning, learning rates
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.loads)
    assert "url(" not in (out / "report.html").read_text()


def test_the_figures_that_the_markdown_shows_lie_beside_it(tuned_comparison):
    out, _ = tuned_comparison
    shown = re.findall(r"!\[[^]]*\]\((\S+)\)", (out / "report.md").read_text())
    assert len(shown) == 5
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in shown)


def test_a_report_is_rebuilt_from_the_files_alone(tuned_comparison):
    out, content = tuned_comparison
    before = {name: (out / name).read_text() for name in ("compare.json", "report.md", "report.html")}
    (out / "compare.json").unlink()
    assert render(out) == content
    assert {name: (out / name).read_text() for name in before} == before


def test_one_seed_is_said_to_tell_nothing_from_noise(tmp_path):
    content = synthetic_compare(tmp_path, tuned=TUNED)
    (comparison,) = content["comparisons"]
    assert comparison["loss_gap"]["ci95"] is None
    assert comparison["loss_gap"]["significant"] is None
    assert "with one seed" in comparison["statement"]
    said = "One seed cannot separate an effect from noise"
    assert content["answer"][-1].startswith(said)
    assert Page((tmp_path / "report.html").read_text()).text.count(said) == 1
    assert (tmp_path / "report.md").read_text().count(said) == 1
    console = Console(file=StringIO(), width=200)
    print_summary(content, tmp_path, console)
    assert console.file.getvalue().count(said) == 1


def test_one_seed_that_diverged_is_not_said_to_be_noise(tmp_path):
    arms = ["adamw:uniform", "adamw:paper"]
    content = synthetic_compare(tmp_path, arms, tuned=TUNED | {"adamw:paper:N": Setting(0.1)})
    assert not any("noise" in sentence for sentence in [*content["answer"], *content["warnings"]])


def test_a_gap_within_the_noise_is_said_to_be_none(tmp_path):
    arms = ["adamw:uniform", "same=adamw:qk=1.01"]
    tuned = TUNED | {"adamw:qk=1.01:N": Setting(2e-3)}
    content = synthetic_content(tmp_path, arms, seeds=(0, 1, 2), tuned=tuned)
    assert content["comparisons"][0]["loss_gap"]["significant"] is False
    assert "cannot be told apart" in content["answer"][0]


def test_untuned_arms_are_called_untuned(tmp_path):
    content = synthetic_content(tmp_path)
    assert content["tuned"] is False
    assert "tuned adamw:uniform" not in content["answer"][0]
    assert any("No base learning rate was tuned: every arm ran at 0.0006" in w for w in content["warnings"])


def test_a_choice_at_the_grids_edge_is_warned_of(tmp_path):
    content = synthetic_content(
        tmp_path,
        base_lrs=(2e-3, 4e-3, 8e-3),
    )
    (warning,) = [w for w in content["warnings"] if "edge of the grid" in w]
    assert "adamw:uniform (0.002), adamw:uniform 2N (0.002), adamw:paper (0.002)" in warning


@pytest.fixture(scope="module")
def refined_comparison(tmp_path_factory):
    """Warm-ups tuned too, best at 60 % for uniform and at 15 % for the paper's ratios; and one refinement."""
    out = tmp_path_factory.mktemp("refined")
    tuning = {"base_lrs": (1e-3, 2e-3, 4e-3), "warmups": (0.15, 0.6), "refine": True}
    return out, synthetic_compare(out, seeds=[0, 1], **tuning)


def test_every_arm_runs_at_the_warm_up_that_was_chosen_for_it(refined_comparison):
    out, content = refined_comparison
    chosen = {"adamw:uniform": 0.6, "adamw:uniform 2N": 0.6, "adamw:paper": 0.15}
    for name, warmup in chosen.items():
        arm = content["arms"][name]
        assert (arm["base_lr"], arm["warmup_fraction"]) == (2e-3, warmup)
        for run in arm["seeds"]:
            config = json.loads((out / run["run"] / "config.json").read_text())
            assert config["train"]["optim"]["warmup_fraction"] == warmup
    tried = [run["arm"] for run in content["tuning"]]
    assert {name: tried.count(name) for name in chosen} == dict.fromkeys(chosen, 3 * 2 + 2)
    assert [run["arm"] for run in content["tuning"] if run["chosen"]] == list(chosen)
    assert content["tuned"] is True


def test_a_report_says_which_warm_ups_were_tuned(refined_comparison):
    out, _ = refined_comparison
    report = (out / "report.md").read_text()
    assert (
        "every arm tuned over 0.001, 0.002, 0.004 with warm-ups of 15%, 60%, then a factor of √2 to either side of "
        "the best, with seed 0, chosen by the tune loss"
    ) in report
    assert "| arm | optimizer | ratios | base LR | warm-up | steps |" in report
    assert "| adamw:paper | adamw | paper | 0.002 | 15% | 60 |" in report
    shared = report.split("Optimizer and schedule")[1].split("###")[0]
    assert "warmup" in shared
    assert r"warmup\_fraction" not in shared
    for rows in report.split("\n\n"):
        assert len(set(table_rows(rows))) <= 1


def test_a_warm_up_at_the_edge_is_warned_of_where_there_were_three(tmp_path, refined_comparison):
    assert not any("edge" in warning for warning in refined_comparison[1]["warnings"])
    content = synthetic_content(tmp_path, base_lrs=(2e-3,), warmups=(0.1, 0.3, 0.6), refine=True)
    (warning,) = [w for w in content["warnings"] if "edge of the grid" in w]
    assert "The chosen warm-up is at the edge of the grid for adamw:uniform (60%)" in warning
    assert warning.endswith("widen --warmups.")
    assert content["tuned"] is True


def test_a_grid_of_one_is_no_tuning(tmp_path):
    content = synthetic_content(tmp_path, base_lrs=(2e-3,))
    assert content["tuned"] is False
    assert any("The grid holds one base learning rate, 0.002" in w for w in content["warnings"])


def test_a_learning_rate_without_another_to_compare_with_is_not_called_tuned(tmp_path):
    content = synthetic_content(tmp_path, base_lrs=(2e-3,), warmups=(0.1, 0.3), seeds=(0, 1))
    assert content["at_edge"] == list(content["arms"])
    assert "LOSES to adamw:uniform by" in content["answer"][0]
    assert any("The chosen base learning rate is at the edge of the grid" in w for w in content["warnings"])


@pytest.mark.slow
def test_a_diverged_arm_has_no_numbers_and_is_said_to_have_diverged(tmp_path):
    arms = ["adamw:uniform", "adamw:paper", "adamw:quickstart"]
    tuned = TUNED | {"adamw:paper:N": Setting(0.1), "adamw:quickstart:N": Setting(2e-3)}
    content = synthetic_compare(tmp_path, arms, seeds=[0, 1], tuned=tuned)
    paper, quickstart = content["comparisons"]
    assert (paper["loss_gap"]["mean"], paper["speedup"]["value"], paper["speedup_decayed"]["bound"]) == (
        None,
    ) * 3
    assert paper["diverged"] == {"adamw:paper": [0, 1]}
    assert paper["statement"].startswith("adamw:paper diverged with 2 of 2 seeds")
    assert quickstart["loss_gap"]["mean"] is not None
    assert content["answer"][-1] == paper["statement"]
    assert content["arms"]["adamw:paper"]["seeds"][0]["terminal_val_loss"] is None
    assert "diverged" in (tmp_path / "report.md").read_text()


def test_a_diverged_2n_baseline_leaves_the_loss_gap(tmp_path):
    content = synthetic_content(
        tmp_path,
        seeds=(0, 1),
        tuned=TUNED | {"adamw:uniform:2N": Setting(0.5)},
    )
    (comparison,) = content["comparisons"]
    assert comparison["loss_gap"]["mean"] is not None
    assert comparison["speedup"]["value"] is comparison["speedup_decayed"]["value"] is None
    assert "undefined by the paper's measure" in comparison["statement"]


def test_a_diverged_run_of_the_grid_is_never_chosen(tmp_path):
    content = synthetic_content(
        tmp_path,
        base_lrs=(1e-3, 2e-3, 1.0),
    )
    assert content["arms"]["adamw:paper"]["base_lr"] == 2e-3
    assert [run["tune_loss"] for run in content["tuning"] if run["base_lr"] == 1.0] == [None] * 3


def test_an_arm_that_always_diverges_is_reported(tmp_path):
    content = synthetic_content(
        tmp_path,
        base_lrs=(0.1, 0.2),
    )
    assert "adamw:paper diverged at every base learning rate of the grid." in content["warnings"]


def test_hostile_names_are_shown_and_never_run(tmp_path):
    content = synthetic_compare(
        tmp_path, ["adamw:uniform", f"{HOSTILE}=adamw:paper"], tuned=TUNED, command=f"compare {HOSTILE} ```"
    )
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert HOSTILE in content["arms"]
    assert "script" not in page.tags
    assert f"{HOSTILE} ends" in page.text
    assert f"compare {HOSTILE} ```" in page.text
    markdown = (tmp_path / "report.md").read_text()
    outside_the_command = markdown.partition("## How to repeat it")[0]
    assert "<script>" not in outside_the_command
    assert {7, 8, 10} == set(table_rows(outside_the_command)) - {3}  # no name opened a column of its own
    assert "````\ncompare" in markdown  # a fence longer than any in the command


def test_runs_of_an_earlier_plan_are_reported_too(tmp_path):
    synthetic_content(tmp_path, seeds=(7,), tuned=TUNED)
    content = synthetic_content(tmp_path, seeds=(0,), tuned=TUNED)
    assert [run["seed"] for run in content["other_runs"]] == [7, 7, 7]
    assert sum("earlier plan" in row for row in runs_table(content).rows) == 3


@pytest.fixture
def finished(tuned_comparison, tmp_path) -> Path:
    """A copy, to be damaged, of a finished comparison."""
    return shutil.copytree(tuned_comparison[0], tmp_path / "copy")


def test_runs_on_different_machines_are_warned_of(finished, tuned_comparison):
    _, content = tuned_comparison
    path = finished / content["arms"]["paper"]["seeds"][1]["run"] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hardware": {"device": "another"}}))
    assert any(w.startswith("The runs differ in hardware") for w in render(finished)["warnings"])


def test_a_run_evaluated_only_at_its_end_still_gives_a_report(tmp_path):
    base = TrainConfig(steps=60, log_every=3, eval_every=0, save_every=0)
    content = synthetic_compare(tmp_path, tuned=TUNED, base=base)
    assert content["comparisons"][0]["speedup"]["bound"] == "at_most"
    assert content["comparisons"][0]["speedup"]["value"] == 2.0


def test_the_terminals_table_fits_it_and_reads_no_markup(tmp_path):
    content = synthetic_content(
        tmp_path,
        ["adamw:uniform", "[red]a[/b]=adamw:paper"],
        seeds=(0, 1),
        tuned=TUNED,
    )
    screen = StringIO()
    print_summary(content, tmp_path, Console(file=screen, width=80))
    lines = screen.getvalue().splitlines()
    assert any(line.strip().startswith("[red]a[/b] ") for line in lines)
    assert "…" not in screen.getvalue()
    assert all(len(line) <= 80 for line in lines if not line.startswith("Report:"))
    assert lines[-1] == f"Report: {tmp_path / 'report.html'}"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "result.json").unlink(), r"not finished: 1 of 12 runs are missing"),
        (lambda run: (run / "result.json").write_text("{"), "is not a run's result; delete the folder"),
        (lambda run: (run / "config.json").unlink(), "cannot read the run in .*FileNotFoundError"),
        (
            lambda run: (run / "result.json").write_text('{"finished": true}'),
            "cannot read the run in .*KeyError",
        ),
    ],
)
def test_a_damaged_run_is_named(finished, tuned_comparison, damage, message):
    _, content = tuned_comparison
    damage(finished / content["arms"]["paper"]["seeds"][1]["run"])
    with pytest.raises(UserError, match=message):
        render(finished)


def test_a_comparison_leaves_a_search_and_its_plan_alone(tmp_path):
    check_folder(SearchPlan(BASE), tmp_path / "search")
    before = (tmp_path / "search" / "plan.json").read_bytes()
    message = r"plan\.json is not the plan of a comparison; choose another --out"
    with pytest.raises(UserError, match=message):
        synthetic_compare(tmp_path / "search", tuned=TUNED)
    with pytest.raises(UserError, match=message):
        render(tmp_path / "search")
    assert [path.name for path in (tmp_path / "search").iterdir()] == ["plan.json"]
    assert (tmp_path / "search" / "plan.json").read_bytes() == before
    check_folder(SearchPlan(BASE), tmp_path / "search")  # it can be continued
    assert synthetic_compare(tmp_path / "another", tuned=TUNED)["arms"]


@pytest.mark.parametrize(
    "content", ["{}", "[]", "no JSON", "\xff", '{"plan": {}}', '{"command": "", "date": ""}']
)
def test_a_file_that_is_not_the_plan_of_a_comparison_is_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content.encode("latin-1"))
    for refused in (lambda: synthetic_compare(tmp_path, tuned=TUNED), lambda: render(tmp_path)):
        with pytest.raises(UserError, match="is not the plan of a comparison; choose another --out"):
            refused()
    assert path.read_bytes() == content.encode("latin-1")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("command", ["robustness", "ablation", "scaling", "tune"])
def test_a_comparison_does_not_replace_the_report_of_another_command(tmp_path, command):
    (tmp_path / f"{command}.json").write_text("{}")
    with pytest.raises(UserError) as error:
        synthetic_compare(tmp_path, tuned=TUNED)
    assert str(error.value) == (
        f"{tmp_path} holds the report of {command} ({command}.json), and compare would replace it; choose another --out"
    )
    assert [path.name for path in tmp_path.iterdir()] == [f"{command}.json"]


def test_other_arms_and_seeds_go_on_in_the_folder_of_a_comparison(tmp_path):
    synthetic_compare(tmp_path, tuned=TUNED)
    runs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/result.json")}
    assert synthetic_compare(tmp_path, tuned=TUNED, seeds=[0, 1])["seeds"] == [0, 1]
    assert (
        runs.items()
        <= {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/result.json")}.items()
    )


def test_a_folder_without_a_comparison_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no comparison"):
        render(tmp_path)


def test_a_finished_comparison_is_reported_again_without_its_text(tmp_path):
    text = tmp_path / "texts.jsonl"
    text.write_text('{"text": "words"}\n')
    base = replace(BASE, data=replace(BASE.data, data=str(text)))
    before = synthetic_compare(tmp_path / "out", base=base)
    text.unlink()
    assert synthetic_compare(tmp_path / "out", base=base)["comparisons"] == before["comparisons"]
    with pytest.raises(UserError, match=r"texts\.jsonl"):
        synthetic_compare(tmp_path / "other", base=base)


def changed(folder, change):
    """Rewrite the losses of finished runs, then report them again: `change(config, result)`."""
    for path in folder.rglob("result.json"):
        config = json.loads((path.parent / "config.json").read_text())["train"]
        result = json.loads(path.read_text())
        change(config, result)
        path.write_text(json.dumps(result))


def test_a_baseline_that_rises_with_more_steps_is_said_to_rise(tmp_path):
    synthetic_content(tmp_path, seeds=(0, 1, 2))

    def rise(config, result):
        result["terminal_val_loss"] = {60: 3.5, 120: 3.6}[config["steps"]] + 0.001 * config["seed"]
        if config["optim"]["ratios"] == "paper":
            result["terminal_val_loss"] = 3.4 - 0.002 * config["seed"]

    changed(tmp_path, rise)
    content = synthetic_compare(tmp_path, seeds=[0, 1, 2])
    (comparison,) = content["comparisons"]
    reason = "the baseline ends higher after 120 steps than after 60 (3 of 3 seeds)"
    decayed = comparison["speedup_decayed"]
    assert (decayed["value"], decayed["bound"], decayed["ci95"]) == (None, None, None)
    assert decayed["reason"] == reason
    assert decayed["per_seed"][0]["reason"] == "the baseline ends higher after 120 steps than after 60"
    assert f"undefined, since {reason}, between fully decayed runs." in comparison["statement"]
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert reason in text
        assert "≥ 2.00×" not in text.split("decayed")[0]


def test_equal_gaps_are_reported_without_an_interval(tmp_path):
    synthetic_content(tmp_path, seeds=(0, 1, 2))

    def equal(config, result):
        result["terminal_val_loss"] = 240 / config["steps"] + 0.01 * config["seed"]
        if config["optim"]["ratios"] == "paper":
            result["terminal_val_loss"] -= 0.1

    changed(tmp_path, equal)
    content = synthetic_compare(tmp_path, seeds=[0, 1, 2])
    (comparison,) = content["comparisons"]
    assert comparison["loss_gap"]["mean"] == pytest.approx(0.1)
    assert comparison["loss_gap"]["ci95"] is None
    assert (
        "ends 0.100 nats below adamw:uniform after 60 steps. No interval for 3 seeds: all seeds are equal"
        in (comparison["statement"])
    )
    assert "| unknown |" in (tmp_path / "report.md").read_text()


def test_an_arm_at_the_edge_of_the_grid_is_not_called_tuned(tmp_path):
    content = synthetic_compare(tmp_path / "edge", base_lrs=[2e-3, 4e-3, 8e-3])
    assert content["at_edge"] == ["adamw:uniform", "adamw:uniform 2N", "adamw:paper"]
    for page in ("report.md", "report.html"):
        text = (tmp_path / "edge" / page).read_text(encoding="utf-8")
        assert "at the edge of the grid, so not tuned: adamw:uniform" in text
        assert not re.search(r"(?<!not )(?<!every arm )\btuned\b", text.replace(content["command"], ""))
    inside = synthetic_content(tmp_path / "inside", base_lrs=(1e-3, 2e-3, 4e-3))
    assert inside["at_edge"] == []
    assert "tuned adamw:uniform" in inside["answer"][0]


def test_arms_of_any_number_differ_in_every_figure():
    from types import SimpleNamespace

    from blockwise_lr.compare.arms import Arm, Series
    from blockwise_lr.compare.figures import _style

    arms = tuple(Arm(str(i), "adamw", f"emb={i + 2}") for i in range(40))
    results = SimpleNamespace(plan=SimpleNamespace(arms=arms))
    series = [Series(arm.name, arm, "N", 10) for arm in arms]
    series += [Series(f"0 {horizon}", arms[0], horizon, 10) for horizon in ("N/2", "2N", "4N")]
    looks = [repr(sorted(_style(results, each).items(), key=str)) for each in series]
    assert len(set(looks)) == len(series)


def test_blocks_of_one_learning_rate_share_a_line_also_where_it_is_zero():
    from types import SimpleNamespace

    from blockwise_lr import drawing
    from blockwise_lr.compare.figures import _draw_learning_rates

    rows = [
        {"step": i, "lr": dict.fromkeys(("emb", "qk", "vo"), lr)} for i, lr in enumerate((1e-3, 5e-4, 0.0))
    ]
    results = SimpleNamespace(
        plan=SimpleNamespace(series=[SimpleNamespace(name="uniform")]),
        runs_of=lambda series: [SimpleNamespace(metrics=rows)],
    )
    with drawing.figure((4.0, 3.0)) as figure:
        _draw_learning_rates(figure, results, 1, 1)
        looks = [line.get_linestyle() for line in figure.axes[0].lines]
    assert looks == ["--"] * 3  # dashes in turns, so that none hides another
