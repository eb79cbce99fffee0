"""The initial scale of parameters that have no values: follow their initializer on the meta device."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from blockwise_lr.blocks import Block, BlockMap
from blockwise_lr.blocks.block import Assignment

_SAMPLES = 4001
_SMALL_PART = (
    0.05  # share of the elements below which a view, such as a padding row, does not change the scale
)
# Operations that act on every element alone, so that they can be applied to a sample of the elements.
_ELEMENTWISE = frozenset(
    f"{name}{in_place}"
    for name in ("mul", "div", "add", "sub", "neg", "abs", "clamp", "erfinv", "exp", "log", "pow", "sqrt", "square")
    for in_place in ("", "_")
)  # fmt: skip
_COPIES = frozenset({"clone", "detach", "_to_copy", "alias", "contiguous"})


class RecordedInitializers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which the initial values of tensors on the meta device are followed, without memory for them.

    Each tensor is represented by a sample of its distribution: quantiles of a normal or a uniform distribution, or one
    constant. Elementwise operations are applied to the sample. Everything else makes the values unknown.

    Example:
        >>> with RecordedInitializers() as recorded, torch.device("meta"):
        ...     layer = nn.Linear(4, 8, bias=False)
        ...     _ = nn.init.normal_(layer.weight, std=0.02)
        >>> round(recorded.rms(layer.weight), 4)
        0.02
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._samples: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []  # keeps storages alive, so that their addresses stay unique
        self._originals: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> RecordedInitializers:
        for owner, name, replacement in self._replacements():
            self._originals.append((owner, name, owner[name]))
            owner[name] = replacement
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        while self._originals:
            owner, name, original = self._originals.pop()
            owner[name] = original

    def _replacements(self) -> Iterator[tuple[dict[str, Any], str, Any]]:
        """Yield the initializers that torch skips on the meta device, so that __torch_dispatch__ never sees them."""
        replacements = {"orthogonal_": self._orthogonal, "sparse_": self._sparse}
        owners = [vars(nn.init)]
        if hub := sys.modules.get("transformers.initialization"):  # it holds references to torch's functions
            owners.append(hub.TORCH_INIT_FUNCTIONS)
        yield from ((owner, name, own) for owner in owners for name, own in replacements.items())
        if hasattr(nn.init, "_no_grad_trunc_normal_"):  # trunc_normal_ calls it
            yield vars(nn.init), "_no_grad_trunc_normal_", self._truncated

    def _truncated(
        self, tensor: Tensor, mean: float, std: float, a: float, b: float, generator: Any = None
    ) -> Tensor:
        low, high = (0.5 + math.erf((bound - mean) / std / math.sqrt(2)) / 2 for bound in (a, b))
        self._samples[_key(tensor)] = mean + std * torch.special.ndtri(low + (high - low) * _quantiles())
        return tensor

    def _orthogonal(self, tensor: Tensor, gain: float = 1, generator: Any = None) -> Tensor:
        rows, columns = tensor.shape[0], tensor.numel() // tensor.shape[0]
        # The vectors of the shorter side have length `gain`.
        self._samples[_key(tensor)] = _constant(gain / math.sqrt(max(rows, columns)))
        return tensor

    def _sparse(self, tensor: Tensor, sparsity: float, std: float = 0.01, generator: Any = None) -> Tensor:
        self._samples[_key(tensor)] = _constant(std * math.sqrt(1 - sparsity))
        return tensor

    def rms(self, tensor: Tensor) -> float | None:
        """Return the root mean square of the initial values; None if they are not known.

        A tensor that was not created or initialised in this context is unknown.
        """
        sample = self._samples.get(_key(tensor))
        if sample is None:
            return None
        rms = math.sqrt(float(sample.square().mean()))
        return rms if math.isfinite(rms) else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_meta:
            self._follow(func.overloadpacket.__name__, args, kwargs or {}, result)
        return result

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> None:
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if source is not None and _key(source) == _key(result):
            written = name.endswith("_")
            if not written or result.numel() <= _SMALL_PART * _stored(result):
                return  # a view, or a part too small to matter
            sample = self._sample(name, args, kwargs) if result.numel() == _stored(result) else None
        else:
            self._kept.append(result)
            sample = self._sample(name, args, kwargs)
        if sample is None:
            self._samples.pop(_key(result), None)
        else:
            self._samples[_key(result)] = sample

    def _sample(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return a sample of the values after an operation; None if they are not known."""
        if name in _FILLS:
            return _FILLS[name](args, kwargs)
        source = self._samples.get(_key(args[0])) if args and isinstance(args[0], Tensor) else None
        if name == "copy_":
            return self._samples.get(_key(args[1])) if isinstance(args[1], Tensor) else None
        if source is None or any(isinstance(each, Tensor) for each in args[1:]):
            return None
        if name in _COPIES:
            return source
        if name not in _ELEMENTWISE:
            return None
        with torch.device("cpu"):
            applied: Tensor = getattr(torch.ops.aten, name.rstrip("_"))(source, *args[1:], **kwargs)
        return applied


def initial_rms(model: nn.Module, recorded: RecordedInitializers) -> dict[str, float | None]:
    """Return the RMS of the initial values of each trainable parameter, by name; None where it is not known.

    Args:
        model: a model that was built on the meta device within `recorded`, or one with real weights. The latter are
            taken as they are.
        recorded: the context in which the model was built.
    """
    return {
        name: recorded.rms(parameter) if parameter.is_meta else _rms(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def rms_by_block(rms: Mapping[str, float | None], blocks: BlockMap) -> dict[Block, float | None]:
    """Return the RMS of each block before its fused weights are split; None if a parameter of it is not known.

    Parameters that are zero are left out. A block of zeros has RMS 0. Values have six digits.

    Args:
        rms: the RMS of each parameter.
        blocks: the blocks of the same parameters. The parts of a fused weight count for their own blocks.
    """
    members: dict[Block, list[tuple[float | None, float]]] = {}
    for name, entry in ((name, blocks.assignment(name)) for name in blocks):
        for block, numel in _numel_by_block(entry).items():
            members.setdefault(block, []).append((rms[name], numel))
    found: dict[Block, float | None] = {}
    for block in (block for block in Block if block in members):
        known = [(value, numel) for value, numel in members[block] if value is not None]
        nonzero = [(value**2 * numel, numel) for value, numel in known if value > 0]
        total = sum(numel for _, numel in nonzero)
        mean = sum(square for square, _ in nonzero) / total if total else 0.0
        found[block] = float(f"{math.sqrt(mean):.6g}") if len(known) == len(members[block]) else None
    return found


def _numel_by_block(entry: Assignment) -> dict[Block, float]:
    if entry.block is not Block.QKV or not entry.parts:
        return {entry.block: entry.numel}
    slices = entry.slices or {}
    lengths = {part: slices[part].length if part in slices else 1 for part in entry.parts}
    numels: dict[Block, float] = {}
    for part, block in entry.parts.items():
        share = entry.numel * lengths[part] / sum(lengths.values())
        numels[block] = numels.get(block, 0.0) + share
    return numels


def _rms(parameter: Tensor) -> float:
    norm = torch.linalg.vector_norm(
        parameter.detach(), dtype=torch.promote_types(parameter.dtype, torch.float32)
    )
    return float(norm) / math.sqrt(max(parameter.numel(), 1))


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _stored(tensor: Tensor) -> int:
    """Return the number of elements in the storage of a tensor."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _quantiles() -> Tensor:
    return (torch.arange(_SAMPLES, dtype=torch.float64, device="cpu") + 0.5) / _SAMPLES


def _normal(mean: float = 0.0, std: float = 1.0) -> Tensor:
    sample: Tensor = torch.special.ndtri(_quantiles())
    return mean + std * sample / sample.square().mean().sqrt()


def _uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * _quantiles()


def _constant(value: float) -> Tensor:
    return torch.full((1,), float(value), dtype=torch.float64, device="cpu")


_FILLS: Mapping[str, Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor | None]] = {
    "normal_": lambda args, kwargs: _normal(*args[1:3]),
    "uniform_": lambda args, kwargs: _uniform(*args[1:3]),
    "fill_": lambda args, kwargs: None if isinstance(args[1], Tensor) else _constant(args[1]),
    "zero_": lambda args, kwargs: _constant(0.0),
    "zeros": lambda args, kwargs: _constant(0.0),
    "zeros_like": lambda args, kwargs: _constant(0.0),
    "ones": lambda args, kwargs: _constant(1.0),
    "ones_like": lambda args, kwargs: _constant(1.0),
    "full": lambda args, kwargs: _constant(args[1]),
    "full_like": lambda args, kwargs: _constant(args[1]),
    "randn": lambda args, kwargs: _normal(),
    "randn_like": lambda args, kwargs: _normal(),
    "rand": lambda args, kwargs: _uniform(),
    "rand_like": lambda args, kwargs: _uniform(),
}
"""Operations that set all values: their sample, from the arguments of the operation."""
