"""timm, with the torchvision that it imports."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(sys.prefix) / "vision"
"""Where the Makefile puts timm and torchvision: on the path of all tests, torchvision would break transformers."""

_STUDIES = Path(__file__).parents[2] / "studies" / "_support"


def is_there(name: str) -> bool:
    """Whether a package is installed, in the folder or in the environment."""
    return (FOLDER / name).is_dir() or importlib.util.find_spec(name) is not None


def import_timm() -> ModuleType:
    """Import timm from wherever it is; skip the test if it is not installed."""
    folders = [str(FOLDER), str(_STUDIES)]
    sys.path += folders
    try:
        from torchvision_repair import repair_torchvision

        repair_torchvision()
        return pytest.importorskip("timm")
    finally:
        for folder in folders:
            sys.path.remove(folder)
