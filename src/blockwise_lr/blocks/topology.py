"""Tree and Site: the module tree of a model without wrappers, and the places of its parameters in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from blockwise_lr.blocks.block import canonical_name

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
CONVOLUTIONS = (nn.modules.conv._ConvNd,)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)

_PARAMETRIZED = re.compile(
    r"(?:(?P<path>.*?)\.)?parametrizations\.(?P<leaf>\w+)\.(?:original(?P<index>\d*)|(?P<inner>\d+\..+))"
)
_PARAMETRIZATIONS = re.compile(r"(^|\.)parametrizations\..*")
_FACTOR = re.compile(r"lora_(embedding_)?[AB]")
_HEAD_ATTRIBUTES = ("num_heads", "n_head", "n_heads", "num_attention_heads", "nhead", "heads", "head_dim")


def ancestors(path: str) -> Iterator[str]:
    """Yield the paths of the modules around `path`, nearest first, ending with the model itself ("").

    Example:
        >>> list(ancestors("h.0.attn"))
        ['h.0', 'h', '']
    """
    while path:
        path = path.rpartition(".")[0]
        yield path


def matrix_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """Return (input width, output width) of a linear layer; None if `module` is not one.

    The widths are read from attributes, so a split or sharded weight need not be assembled: `in_features` and
    `out_features`, `nx` and `nf` of transformers' Conv1D (whose weight is (in, out)), or `input_size` and
    `output_size` of Megatron's parallel layers.
    """
    if module is None or isinstance(module, (nn.Embedding, nn.Bilinear, *CONVOLUTIONS)):
        return None
    for inputs, outputs in (("in_features", "out_features"), ("nx", "nf"), ("input_size", "output_size")):
        if isinstance(narrow := _own(module, inputs), int) and isinstance(wide := _own(module, outputs), int):
            return narrow, wide
    return None


def output_dim(module: nn.Module) -> int:
    """Return the dimension of a linear layer's weight that counts its outputs: 0, or 1 for transformers' Conv1D."""
    return 1 if isinstance(_own(module, "nf"), int) else 0


def table_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (rows, width) of an embedding; None if `module` is not one.

    An embedding is an nn.Embedding, or a module with its attributes and a matrix as weight (Megatron's, EmbeddingBag).
    """
    rows, width = _own(module, "num_embeddings"), _own(module, "embedding_dim")
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Embedding) or (weight is not None and weight.ndim == 2):
        return (rows, width) if isinstance(rows, int) and isinstance(width, int) else None
    return None


def has_heads(module: nn.Module) -> bool:
    """Return whether a module has an attribute with its number of attention heads.

    The attribute must be the module's own. A `config` does not count, because an MLP may have one, too.
    """
    return any(isinstance(_own(module, name), int) for name in _HEAD_ATTRIBUTES)


def _own(module: nn.Module, name: str) -> object:
    """Return an attribute that is neither a parameter nor a module, or None. Avoids the slow look-up of nn.Module."""
    if name in module.__dict__:
        return module.__dict__[name]
    return getattr(module, name, None) if hasattr(type(module), name) else None


@dataclass(frozen=True)
class Site:
    """One place in the module tree where a parameter is used. A tied parameter has several.

    Args:
        name: the parameter's name from `named_parameters()`.
        path: the canonical path of the module that owns the parameter.
        leaf: the attribute that holds it, e.g. "weight". For a parametrized weight: the name of that weight.
        param: the parameter.
        module: the module that owns it.
        parametrized: whether it is one of the originals of a parametrized weight. Default: False.
        of_parametrization: whether it belongs to a parametrization of the weight, as a factor of a LoRA that is written
            as one. Default: False.
        part: after split_fused, the part that it holds, e.g. "q"; otherwise None.
    """

    name: str
    path: str
    leaf: str
    param: Tensor
    module: nn.Module
    parametrized: bool = False
    of_parametrization: bool = False
    part: str | None = None

    @property
    def type_name(self) -> str:
        """The class name of the owner, without the class that a parametrization adds."""
        return type_before_parametrizations(self.module).__name__

    @property
    def child(self) -> str:
        """The attribute name of the owner in its parent module."""
        return self.path.rpartition(".")[2]


class Tree:
    """The modules of a model by canonical path. Of a wrapper and the module that it wraps, the inner one counts.

    Args:
        model: the model, wrapped or not.

    Attributes:
        modules: path -> module.
        children: path -> paths of the direct children.
        owners: paths of the modules that own parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.children: dict[str, list[str]] = {}
        self.owners: set[str] = set()
        self._parameters: dict[str, Tensor] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            path = canonical_name(f"{name}.").rstrip(".")
            for leaf, param in module._parameters.items():  # the order of named_parameters(), in one pass
                if param is not None:
                    self._parameters[f"{name}.{leaf}" if name else leaf] = param
                    self.owners.add(_PARAMETRIZATIONS.sub("", path))
            if "parametrizations" in path.split("."):
                continue
            if path not in self.modules and path:
                self.children.setdefault(path.rpartition(".")[0], []).append(path)
            self.modules[path] = module

    @cached_property
    def sites(self) -> dict[str, list[Site]]:
        """Every trainable parameter, by its first name -> all sites where it is used."""
        by_id: dict[int, list[Site]] = {}
        for name, param in self._parameters.items():
            if param.requires_grad:
                by_id.setdefault(id(param), []).append(self._site(name, param))
        return {sites[0].name: sites for sites in by_id.values()}

    def _site(self, name: str, param: Tensor) -> Site:
        canonical = canonical_name(name)
        found = _PARAMETRIZED.fullmatch(canonical)
        if found is None:
            path, _, leaf = canonical.rpartition(".")
            return Site(name, path, leaf, param, self.modules[path])
        path, leaf = found["path"] or "", found["leaf"]
        module = self.modules[path]
        if found["inner"] is not None:
            return Site(name, path, leaf, param, module, of_parametrization=True)
        # Only the parametrization of split_fused has part names.
        names = getattr(getattr(module, "parametrizations")[leaf][0], "part_names", ())  # noqa: B009
        part = names[int(found["index"])] if names else None
        return Site(name, path, leaf, param, module, parametrized=True, part=part)

    def matrices(self, path: str) -> dict[str, tuple[int, int]]:
        """Return the linear layers among the direct children of a module: path -> (input width, output width).

        A child that contains one linear layer, and otherwise only norms and modules without parameters, counts as one.
        The factors of a LoRA adapter are left out.
        """
        children = (c for c in self.children.get(path, ()) if not _FACTOR.fullmatch(c.rpartition(".")[2]))
        shapes = {child: matrix_shape(self.modules[self.linear(child)]) for child in children}
        return {child: shape for child, shape in shapes.items() if shape is not None}

    def inside(self, path: str, without: str) -> Iterator[str]:
        """Yield the paths of all modules inside `path`, except `without` and everything inside that."""
        for child in self.children.get(path, ()):
            if child != without:
                yield child
                yield from self.inside(child, without)

    def linear(self, path: str) -> str:
        """Return the path of the only linear layer inside a module, ignoring norms; otherwise `path`."""
        if any(p is not None for p in self.modules[path]._parameters.values()):
            return path
        inside = [child for child in self.children.get(path, ()) if child in self.holders]
        rest = [child for child in inside if not self.is_norm(child)]
        inner = self.linear(rest[0]) if len(rest) == 1 else path
        return inner if self.is_matrix(inner) else path

    def is_norm(self, path: str) -> bool:
        """Return whether a module is one of torch's norms, with parameters."""
        module = self.modules[path]
        return self.holders[path] == 1 and path in self.owners and isinstance(module, NORMS)

    @cached_property
    def holders(self) -> Counter[str]:
        """Path of every module that contains parameters -> how many modules inside it, itself included, own some."""
        return Counter(around for path in self.owners for around in (path, *ancestors(path)))

    def is_matrix(self, path: str) -> bool:
        """Return whether a module is a linear layer."""
        return matrix_shape(self.modules[path]) is not None

    def shape(self, path: str) -> tuple[int, int]:
        """Return (input width, output width) of a linear layer, or of a module that contains nothing else."""
        shape = matrix_shape(self.modules[self.linear(path)])
        assert shape is not None, f"{path} is no linear layer"
        return shape

    def is_plain(self, path: str) -> bool:
        """Return whether a module has no bare parameter and no convolution, so it is no state-space mixer."""
        module = self.modules[path]
        bare = any(param is not None for param in module._parameters.values())
        children = (self.modules[child] for child in self.children.get(path, ()))
        return not bare and not any(isinstance(child, CONVOLUTIONS) for child in children)
