"""Set the precision of fp32 matrix products for a block of code, then restore the process's setting.

Some libraries enable TF32 for the whole process; transformers and accelerate do so for ``torch_compile``. A product in
TF32 keeps 10 bits of each factor's mantissa. fp32 has 23.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

HALF = frozenset((torch.float16, torch.bfloat16))
"""The dtypes of half precision."""

Precision = Literal["ieee", "tf32"]
"""The precision of fp32 matrix products and convolutions on a GPU. "ieee" is full fp32."""

_ROOT: Any = torch.backends
_CUDNN: Any = torch.backends.cudnn
_MKLDNN: Any = torch.backends.mkldnn
# Each setting with its parent. A setting of "none" takes its parent's value, so parents come first.
_PARENTS: tuple[tuple[Any, Any], ...] = (
    (torch.backends.cuda.matmul, _ROOT),
    (_CUDNN, _ROOT),
    (_CUDNN.conv, _CUDNN),
    (_CUDNN.rnn, _CUDNN),
    (_MKLDNN, _ROOT),
    (_MKLDNN.matmul, _MKLDNN),
    (_MKLDNN.conv, _MKLDNN),
    (_MKLDNN.rnn, _MKLDNN),
)
# torch stores its two older settings separately, and raises an error on reading them unless the newer ones agree.
_LEGACY_MATMUL = (("ieee", "ieee"), ("tf32", "tf32"), ("tf32", "bf16"))


@dataclass(frozen=True)
class Fp32Settings:
    """All settings of torch for the precision of fp32 products.

    Args:
        root: ``torch.backends.fp32_precision``.
        each: the ``fp32_precision`` of each backend and operation; "none" if it takes its parent's value.
        matmul: ``torch.get_float32_matmul_precision()``.
        cudnn: ``torch.backends.cudnn.allow_tf32``.
    """

    root: str
    each: tuple[str, ...]
    matmul: str
    cudnn: bool

    @classmethod
    def now(cls) -> Fp32Settings:
        """Return the current settings of the process. They do not change."""
        root = _ROOT.fp32_precision
        each = []
        for setting, parent in _PARENTS:
            own = _own_value(setting, parent)
            each.append(own)
            setting.fp32_precision = "none"
            parent.fp32_precision = "none"
        settings = cls(root, tuple(each), _legacy_matmul(), _legacy_cudnn())
        settings.restore()
        return settings

    def restore(self) -> None:
        """Apply these settings to the process."""
        _ROOT.fp32_precision = "none"
        torch.set_float32_matmul_precision(self.matmul)
        _CUDNN.allow_tf32 = self.cudnn
        for (setting, _), value in zip(_PARENTS, self.each):
            setting.fp32_precision = value
        _ROOT.fp32_precision = self.root


def _own_value(setting: Any, parent: Any) -> str:
    """Return a setting's own value: "none" if it follows its parent. Changes the parent's value."""
    found = []
    for value in ("ieee", "tf32"):
        parent.fp32_precision = value
        found.append(setting.fp32_precision)
    return str(found[0]) if found[0] == found[1] else "none"


def _legacy_matmul() -> str:
    for cuda, mkldnn in _LEGACY_MATMUL:
        torch.backends.cuda.matmul.fp32_precision = cuda
        _MKLDNN.matmul.fp32_precision = mkldnn
        try:
            return torch.get_float32_matmul_precision()
        except RuntimeError:  # the stored value belongs to another pair
            continue
    return "highest"


def _legacy_cudnn() -> bool:
    for value in ("ieee", "tf32"):
        _CUDNN.conv.fp32_precision = _CUDNN.rnn.fp32_precision = value
        try:
            return bool(_CUDNN.allow_tf32)
        except RuntimeError:
            continue
    return True


def set_fp32_precision(precision: Precision) -> None:
    """Set the precision of fp32 products and convolutions on a GPU, in torch's older and newer settings."""
    tf32 = precision == "tf32"
    _ROOT.fp32_precision = "none"
    for setting, _ in _PARENTS:
        setting.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")  # applies to the CPU too
    torch.backends.cuda.matmul.allow_tf32 = tf32
    _CUDNN.allow_tf32 = tf32


@contextmanager
def kept_fp32_precision() -> Iterator[None]:
    """Restore the precision of fp32 products at the end of the block."""
    before = Fp32Settings.now()
    try:
        yield
    finally:
        before.restore()


@contextmanager
def fp32_precision(precision: Precision) -> Iterator[None]:
    """Compute fp32 products in a precision, and restore the process's own at the end of the block.

    The function also works as a decorator.

    Example:
        >>> before = torch.get_float32_matmul_precision()
        >>> with fp32_precision("tf32"):
        ...     torch.get_float32_matmul_precision()
        'high'
        >>> torch.get_float32_matmul_precision() == before
        True
    """
    with kept_fp32_precision():
        set_fp32_precision(precision)
        yield
