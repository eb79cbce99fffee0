"""timm, with the torchvision that it imports."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(sys.prefix) / "vision"
"""Where the Makefile puts timm and torchvision: on the path of all tests, torchvision would break transformers."""


def repair_torchvision() -> None:
    """Make torchvision importable, if it is installed and was built for CUDA where torch is built for the CPU.

    timm imports torchvision, and so does transformers if it is there. PyPI has it for Linux with CUDA only. Without
    CUDA it lacks two operators. A vision Transformer does not use them, so declaring them is enough.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor a, Tensor b, float c) -> Tensor")


def is_there(name: str) -> bool:
    """Whether a package is installed, in the folder or in the environment."""
    return (FOLDER / name).is_dir() or importlib.util.find_spec(name) is not None


def import_timm() -> ModuleType:
    """Import timm from wherever it is; skip the test if it is not installed."""
    sys.path.append(str(FOLDER))
    try:
        repair_torchvision()
        return pytest.importorskip("timm")
    finally:
        sys.path.remove(str(FOLDER))
