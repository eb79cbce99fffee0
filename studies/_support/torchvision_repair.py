"""Make torchvision importable beside a torch that is built for the CPU."""

from __future__ import annotations

import torch


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
