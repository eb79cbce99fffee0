"""The dtypes of half precision."""

from __future__ import annotations

import torch

HALF = frozenset((torch.float16, torch.bfloat16))
"""Sums over many elements in these dtypes need a wider one."""
