"""What the studies share: runs that are kept, and rules that are added to a finished comparison."""

from __future__ import annotations

import json
import os
import re
import signal
import tarfile
import time
from pathlib import Path

import pytest

from blockwise_lr.train.config import config_from_dict

STUDIES = Path(__file__).parents[2] / "studies"


def test_the_runs_of_a_study_are_kept_and_come_back(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES / "_support"))
    from kept_runs import KEPT, kept

    def finish(folder: Path) -> None:
        folder.mkdir(parents=True)
        for name in (*KEPT, "model.safetensors"):
            (folder / name).write_text(f"{name} of {folder.name}")

    archive, runs = tmp_path / "results" / "runs.tar.gz", tmp_path / "runs"
    finish(runs / "one")
    (runs / "unfinished").mkdir()

    def interrupted() -> None:
        with kept(archive, runs):
            finish(runs / "two")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    first = archive.read_bytes()

    again = tmp_path / "a fresh clone"
    with kept(archive, again):
        assert {path.name for path in again.iterdir()} == {"one", "two"}
        assert {path.name for path in (again / "two").iterdir()} == set(KEPT)
        assert (again / "two" / "result.json").read_text() == "result.json of two"
    assert archive.read_bytes() == first


def test_an_added_rule_is_held_against_the_committed_losses_of_its_seeds(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES / "2026-11-ratio-rules"))
    from add_rules import compare

    def arm(steps: int, role: str, *losses: float) -> dict:
        seeds = [{"seed": i, "terminal_val_loss": loss} for i, loss in enumerate(losses)]
        return {"steps": steps, "role": role, "seeds": seeds}

    study = {
        "steps": 100,
        "arms": {
            "uniform": arm(100, "baseline", 3.0, 4.0),
            "uniform 2N": arm(200, "baseline", 2.0, 3.0),
            "measured": arm(100, "arm", 1.0, 1.0),
        },
    }
    found = compare(study, arm(100, "arm", 2.5, 3.5), None)
    assert found["loss_gap"]["mean"] == pytest.approx(0.5)
    assert found["loss_gap"]["ci95"] is None  # equal gaps say nothing of their spread
    assert found["speedup_decayed"]["value"] == pytest.approx(
        2**0.5
    )  # half way in the logarithm of the steps
    assert found["speedup"]["value"] is None
    assert compare(study, arm(100, "arm", 2.5, None), None)["loss_gap"]["mean"] is None

    curves = [{"seed": i, "steps": [100, 200], "val_losses": [3.5 + i, 2.0 + i]} for i in (0, 1)]
    found = compare(study, arm(100, "arm", 2.75, 3.75), curves)  # half way down each curve
    assert found["speedup"]["value"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    "archive",
    [
        "2026-11-ratio-rules/data/four-times-steps/runs.tar.gz",
        "2026-11-ratio-rules/data/llama-2m/added-rules-runs.tar.gz",
        "2026-11-ratio-rules/data/llama-5m/added-rules-runs.tar.gz",
    ],
)
def test_a_kept_run_is_found_by_the_configuration_that_made_it(archive, monkeypatch):
    """A setting that the library gets later must not change the name: the run would be trained again."""
    monkeypatch.syspath_prepend(str(STUDIES / "_support"))
    from kept_runs import name_of

    with tarfile.open(STUDIES / archive) as packed:
        configs = [member for member in packed if re.fullmatch(r"[0-9a-f]{12}/config\.json", member.name)]
        assert len(configs) >= 10
        for member in configs:
            config = config_from_dict(json.load(packed.extractfile(member))["train"])
            assert name_of(config) == member.name.partition("/")[0]
