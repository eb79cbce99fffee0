"""The study of model sizes: its commands, and its page, which shows its data once it has run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from blockwise_lr.cli.compare import CompareCommand
from blockwise_lr.cli.flags import named_preset, parse
from blockwise_lr.cli.scaling import ScalingCommand
from blockwise_lr.compare.plan import Plan
from blockwise_lr.compare.scaling import scaling_content
from blockwise_lr.compare.scaling_sizes import read_sizes
from blockwise_lr.train.build_model import count_parameters

STUDY = Path(__file__).parents[2] / "studies" / "2026-11-sizes"
RAN = (STUDY / "data" / "scaling.json").exists()


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDY))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "compare"))


@pytest.mark.skipif(not RAN, reason="the study has not run yet")
def test_the_page_shows_the_data(tmp_path: Path) -> None:
    from report import load, write

    shutil.copy(STUDY / "README.template.md", tmp_path)
    write(tmp_path, load())
    assert (tmp_path / "README.md").read_text() == (STUDY / "README.md").read_text()


@pytest.mark.skipif(not RAN, reason="the study has not run yet")
def test_the_laws_are_those_of_the_comparisons() -> None:
    from report import load

    content = load()
    folders = [path.parent for path in (STUDY / "data").glob("*/compare.json")]
    sizes, arms = read_sizes(folders)
    again = scaling_content(
        sizes, arms, counted=content["parameters"], draws=content["draws"], command="", date=""
    )
    for arm, fit in content["fits"].items():
        for name in ("E", "A", "alpha"):
            assert again["fits"][arm][name]["value"] == pytest.approx(fit[name]["value"], rel=1e-6)


def test_there_is_a_page_if_and_only_if_the_study_has_run() -> None:
    assert (STUDY / "README.md").exists() == RAN
    assert ("2026-11-sizes/README.md" in (STUDY.parent / "README.md").read_text()) == RAN


def test_the_sizes_are_called_by_their_number_of_parameters() -> None:
    from run import SIZES, config_of

    for size in SIZES:
        count = count_parameters(config_of(size, 10).model)
        assert count / 1e6 == pytest.approx(float(size.rstrip("M")), rel=0.1)


def test_the_commands_are_those_of_the_library(tmp_path: Path) -> None:
    import run

    from blockwise_lr.compare import Arm

    given = run.parse(["--out", str(tmp_path), "--seeds", "0", "1"])
    _, *arguments = run.compare_command("0.3M", given)
    preset, rest = named_preset("compare", arguments)
    command = parse(CompareCommand, "compare", rest, CompareCommand(tmp_path, (), preset))
    assert command.config == run.config_of("0.3M", 300)
    plan = Plan(
        base=command.config,
        arms=tuple(Arm.parse(arm) for arm in command.arms),
        seeds=command.seeds,
        base_lrs=command.base_lrs,
        warmups=command.warmups,
        refine=command.refine,
    )
    tuning = plan.tuning_runs()
    losses = {each: each.base_lr for each in tuning}
    runs = [*tuning, *plan.refining_runs(losses), *plan.final_runs(plan.choose(losses))]
    steps = {each.folder: each.config.steps for each in runs}
    assert run.runs_of(given) == (len(steps), sum(steps.values()) / 300)
    fitted = parse(ScalingCommand, "scaling", run.scaling_command(given)[1:])
    assert [folder.name for folder in fitted.folders] == ["0.15M", "0.3M", "0.6M", "1.8M"]


def test_the_page_can_be_made(tmp_path: Path) -> None:
    from report import load, write
    from test_scaling import content_of, shifted, write_comparisons

    (tmp_path / "scaling.json").write_text(
        json.dumps(content_of(write_comparisons(tmp_path / "made", shifted(1.5))))
    )
    shutil.copy(STUDY / "README.template.md", tmp_path)
    write(tmp_path, load(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "{{" not in text
    assert "## Limits\n- One number of steps" in text
    assert "Warnings of the commands:\n\n- " in text
    assert "needs 1.50 times as many (95 % CI " in text
    assert text.count("| `adamw:half` |") == 1 + 4 + 4  # a law, then a factor and a setting at each size
    for name in ("scaling", "gaps", "factors"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
