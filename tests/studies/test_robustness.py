"""The study of robustness and ablation: its commands, and its pages, which show its data once it has run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from support.commands import call

STUDY = Path(__file__).parents[2] / "studies" / "2026-11-robustness"
RAN = any((STUDY / "data").glob("*/ablation.json"))


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDY))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "compare"))


@pytest.mark.skipif(not RAN, reason="the study has not run yet")
def test_the_pages_show_the_data(tmp_path: Path) -> None:
    from report import load, write

    for page in ("README", "details"):
        shutil.copy(STUDY / f"{page}.template.md", tmp_path)
    write(tmp_path, load())
    for page in ("README.md", "details.md"):
        assert (tmp_path / page).read_text() == (STUDY / page).read_text()


@pytest.mark.skipif(not RAN, reason="the study has not run yet")
def test_both_sweeps_are_of_the_same_runs() -> None:
    from report import load

    for found in load().values():
        assert found["robustness"]["baseline"]["losses"] == found["ablation"]["baseline"]["losses"]
        assert found["robustness"]["points"][0]["losses"] == found["ablation"]["points"][-1]["losses"]


def test_there_is_a_page_if_and_only_if_the_study_has_run() -> None:
    for page in ("README.md", "details.md"):
        assert (STUDY / page).exists() == RAN
    assert ("2026-11-robustness/README.md" in (STUDY.parent / "README.md").read_text()) == RAN


@pytest.mark.parametrize("kind", ["robustness", "ablation"])
def test_the_commands_count_their_runs(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from run import command, parse

    given = parse(["--out", str(tmp_path / "out"), "--steps", "10"])
    code, out, err = call(capsys, *command(kind, given), "--dry-run")
    assert (code, err) == (0, "")
    # Two arms try 3 x 2 settings and 2 more; 30 or 10 arms train with 3 seeds, two runs of which are of the grid.
    arms, runs = {"robustness": (30, 104), "ablation": (10, 44)}[kind]
    assert out.startswith(f"{arms} arms, {runs} runs of 10 steps: about ")
    given = parse(["--base-lrs"])
    assert given.model == "quickstart"
    assert "--base-lrs" not in command(kind, given)
    assert "--warmups" not in command(kind, given)


def test_both_sweeps_share_their_runs_and_the_pages_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import run
    from report import load, write
    from test_ratio_sweeps import BLOCKS, RATIOS, ablation_points, robustness_points, swept

    points: dict[str, Any] = {
        "robustness": robustness_points("adamw", RATIOS, BLOCKS[:3], (0.5, 2.0)),
        "ablation": ablation_points("adamw", RATIOS, BLOCKS),
    }

    def synthetic(arguments: list[str]) -> None:
        """Stand in for a command of the library, with closed-form losses in place of training."""
        swept(arguments[0], points[arguments[0]], Path(arguments[-1]))

    monkeypatch.setattr(run, "DATA", tmp_path / "data")
    monkeypatch.setattr(run, "call", synthetic)
    for model in ("quickstart", "llama-600k"):
        monkeypatch.setattr("sys.argv", ["run.py", "--model", model, "--out", str(tmp_path / "out")])
        run.main()
        # 10 arms of the one, 4 of the other, and 3 of them are the same (uniform, both, EMB alone); two seeds.
        assert len(list((tmp_path / "out" / model / "runs").glob("*/result.json"))) == 2 * (10 + 4 - 3)
        assert (tmp_path / "data" / model / "runs.tar.gz").exists()
    (tmp_path / "data" / "unfinished").mkdir()
    found = load(tmp_path / "data")
    assert list(found) == ["llama-600k", "quickstart"]
    for sweeps in found.values():
        assert sweeps["robustness"]["baseline"]["losses"] == sweeps["ablation"]["baseline"]["losses"]
    for page in ("README", "details"):
        shutil.copy(STUDY / f"{page}.template.md", tmp_path)
    write(tmp_path, found)
    text = (tmp_path / "README.md").read_text()
    assert "{{" not in text
    assert text.count("**Model `quickstart`**") == text.count("**Model `llama-600k`**") > 4
    assert "| `qk` | 1 | 0.71 | 0.71 | 1.4 | 1.4 |" in text
    assert "| `emb` | 4 | +0.020 (" in text
    assert "end 0.021 nats below uniform after 60 steps" in text
    assert "+emb" in (tmp_path / "details.md").read_text()
    for name in (f"{kind}-{model}.png" for kind in points for model in found):
        assert f"({name})" in text
        assert (tmp_path / name).stat().st_size > 5_000


def test_the_report_of_a_study_without_data_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import report

    monkeypatch.setattr(report, "load", lambda: {})
    with pytest.raises(SystemExit, match="make them by run.py"):
        report.main()
