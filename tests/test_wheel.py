"""The wheel is complete: it passes the index's checks and its command runs from an empty environment."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import blockwise_lr

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
pytestmark = pytest.mark.slow


def run(*words: str | Path, folder: Path) -> str:
    """Run a program outside of the repository and return what it prints."""
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, words)), cwd=folder, capture_output=True, text=True, check=False, env=alone
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling")
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, folder=out)
    return next(out.glob("*.whl"))


def test_the_wheel_passes_the_checks_of_the_package_index(wheel):
    pytest.importorskip("twine")
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", wheel, folder=wheel.parent)


def test_the_wheel_has_every_file_of_the_package(wheel):
    expected = {
        path.relative_to(SOURCE).as_posix()
        for path in (SOURCE / "blockwise_lr").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert packed == expected
    assert licences


def test_the_command_runs_from_an_empty_environment(wheel, tmp_path):
    environment = tmp_path / "empty"
    run(sys.executable, "-m", "venv", "--without-pip", environment, folder=tmp_path)
    binaries = environment / ("Scripts" if sys.platform == "win32" else "bin")
    python = binaries / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-index", wheel, folder=tmp_path)
    assert run(binaries / "blockwise-lr", "--version", folder=tmp_path).strip() == blockwise_lr.__version__
    assert "usage: blockwise-lr" in run(binaries / "blockwise-lr", "--help", folder=tmp_path)
    where = run(python, "-c", "import blockwise_lr; print(blockwise_lr.__file__)", folder=tmp_path)
    assert where.startswith(str(environment))


def test_the_version_is_stated_once():
    assert importlib.metadata.version("blockwise-lr") == blockwise_lr.__version__
