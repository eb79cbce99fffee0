"""ModelFacts: facts about a whole model that the rules use: its embeddings, heads and attentions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from blockwise_lr.blocks.attention import find_projections
from blockwise_lr.blocks.layers import Layers
from blockwise_lr.blocks.layout import Projection
from blockwise_lr.blocks.mixers import find_mixers
from blockwise_lr.blocks.nesting import Nesting
from blockwise_lr.blocks.output_heads import find_heads, without_adapter
from blockwise_lr.blocks.resolved_layouts import LayoutResolver
from blockwise_lr.blocks.split_weights import split_layout
from blockwise_lr.blocks.topology import Site, Tree, ancestors, matrix_shape, table_shape
from blockwise_lr.blocks.user_layouts import LayoutArgument, UserLayouts

_POSITION_SIZES = (
    "n_positions",
    "max_position_embeddings",
    "block_size",
    "n_ctx",
    "context_length",
    "max_seq_len",
)
_POSITION_NAME = re.compile(r"(^|_)(wpe|pe|pos)(_|$)|pos_?emb|position")
_ADAPTER = re.compile(r"(?P<adapted>.+)\.lora_(embedding_)?(A|B|magnitude_vector)\.[^.]+(\.\w+)?")
_SEGMENT_NAME = re.compile(r"token_type|segment")


class ModelFacts:
    """The facts about one model that the rules ask for. Each is computed once, on first use.

    Args:
        model: the model, wrapped or not.
        layout: the layout of fused weights whose layout is unknown, as in :func:`blockwise_lr.split_fused`.
        example: a batch whose run shows unknown layouts.

    Attributes:
        tree: the modules of the model.
        attentions: paths of the attention modules.
        projections: (path, leaf) of each attention parameter -> its :class:`Projection`.
        unresolved: (path, leaf) -> why the layout of this fused weight is unknown.
    """

    def __init__(
        self, model: nn.Module, *, layout: LayoutArgument | None = None, example: Any = None
    ) -> None:
        self.tree = Tree(model)
        found = find_projections(self.tree)
        self.attentions = {projection.attention for projection in found.values()}
        resolved = LayoutResolver(
            self.tree, found, split_layout, lambda: self.vocabularies, UserLayouts(layout), example
        )
        self.projections, self.unresolved = resolved.projections, resolved.problems

    @cached_property
    def nesting(self) -> Nesting:
        """Which modules are in layers, and which contain embeddings and heads."""
        return Nesting(self.tree, self.attentions, set(self.embeddings))

    @cached_property
    def _by_attention(self) -> dict[str, list[tuple[tuple[str, str], Projection]]]:
        """Attention path -> its projections with their (path, leaf)."""
        grouped: dict[str, list[tuple[tuple[str, str], Projection]]] = {}
        for place, projection in self.projections.items():
            grouped.setdefault(projection.attention, []).append((place, projection))
        return grouped

    def projections_of(self, attention: str) -> list[tuple[tuple[str, str], Projection]]:
        """Return the projections of one attention module, each with the (path, leaf) of its parameter."""
        return self._by_attention.get(attention, [])

    def projection(self, site: Site) -> Projection | None:
        """Return the projection of a parameter; None for a parameter outside attention."""
        if site.of_parametrization:
            return None
        paths = (site.path, site.path.removesuffix(".base_layer"))
        return next((found for path in paths if (found := self.projections.get((path, site.leaf)))), None)

    def adapted(self, site: Site) -> list[Site]:
        """Return the sites of the weight that a parameter adapts.

        The list is empty if the parameter is neither of an adapter nor part of a parametrization. An adapter is a LoRA
        factor beside a weight, or anything beside the `base_layer` of a wrapper, as PEFT's layers are built.
        """
        if site.of_parametrization:
            return [replace(site, param=getattr(site.module, site.leaf), of_parametrization=False)]
        found = _ADAPTER.fullmatch(f"{site.path}.{site.leaf}")
        around = self._wrapper(site.path) if found is None else found["adapted"]
        if around is None:
            return []
        modules = self.tree.modules
        # PEFT adapts a parameter by name in a wrapper, which may contain the wrapper of another parameter.
        named = getattr(modules.get(around), "parameter_name", None)
        inside = f"{around}.base_layer"
        while named and f"{inside}.base_layer" in modules:
            inside += ".base_layer"
        leaves = [named] if isinstance(named, str) else ["weight", "in_proj_weight"]
        return [
            replace(site, path=path, leaf=leaf, module=modules[path], param=weight, part=None)
            for path in (inside, around)
            for leaf in leaves
            if path in modules and isinstance(weight := getattr(modules[path], leaf, None), Tensor)
        ]

    def _wrapper(self, path: str) -> str | None:
        """Return the innermost module around `path` that has a base layer, if `path` is beside the base layer."""
        modules, inner = self.tree.modules, path
        while inner:
            inner, _, child = inner.rpartition(".")
            if f"{inner}.base_layer" in modules:
                return inner if child != "base_layer" else None
        return None

    def parts(self, site: Site) -> tuple[str, ...]:
        """Return the attention parts in a parameter: ("q",), ("q", "k", "v") if fused; empty outside attention."""
        if site.part is not None:
            return (site.part,)
        projection = self.projection(site)
        return tuple(name for name, _ in projection.parts) if projection else ()

    # Embeddings and heads
    # ---------------------------------------------------------------------------------------

    @cached_property
    def embeddings(self) -> dict[str, int]:
        """Path of every embedding outside attention -> its number of rows."""
        found = ((path, table_shape(module)) for path, module in self.tree.modules.items())
        return {p: shape[0] for p, shape in found if shape and self.attentions.isdisjoint(ancestors(p))}

    @cached_property
    def vocabularies(self) -> set[int]:
        """Sizes of the token embeddings.

        The embeddings that `get_input_embeddings` returns count; without any, all except position and segment
        embeddings.
        """
        declared = {shape[0] for m in self._declared("get_input_embeddings") if (shape := table_shape(m))}
        neither = (p for p in self.embeddings if not self.is_position(p) and not self.is_segment(p))
        others = {self.embeddings[path] for path in neither}
        return declared or others

    def is_declared(self, module: nn.Module, getter: str) -> bool:
        """Return whether the model returns this module from a getter, such as "get_output_embeddings"."""
        return any(module is declared for declared in self._declared(getter))

    def _declared(self, getter: str) -> list[nn.Module]:
        if getter not in self._declarations:
            self._declarations[getter] = list(self._ask(getter))
        return self._declarations[getter]

    @cached_property
    def _declarations(self) -> dict[str, list[nn.Module]]:
        return {}

    def _ask(self, getter: str) -> Iterator[nn.Module]:
        """Yield what each module of the model returns from a getter."""
        for module in self.tree.modules.values():
            if not callable(getattr(type(module), getter, None)):
                continue
            try:
                found = getattr(module, getter)()
            except (AttributeError, NotImplementedError):  # transformers raises these if there is none
                continue
            if isinstance(found, nn.Module):
                yield found

    def is_position(self, path: str) -> bool:
        """Return whether an embedding is one of positions, by its name or by the configured context length."""
        if self.is_declared(self.tree.modules[path], "get_input_embeddings"):
            return False
        if _POSITION_NAME.search(path.rpartition(".")[2].lower()):
            return True
        sizes, vocabularies = self.configured(*_POSITION_SIZES), self.configured("vocab_size")
        return self.embeddings[path] in sizes - vocabularies

    def is_segment(self, path: str) -> bool:
        """Return whether an embedding is one of token types, by its name."""
        return _SEGMENT_NAME.search(path.rpartition(".")[2].lower()) is not None

    def configured(self, *names: str) -> set[int]:
        """Return the values of these integer settings in all configurations of the model's modules."""
        return {
            value
            for config in self._configs
            for name in names
            if isinstance(value := getattr(config, name, 0), int)
        }

    @cached_property
    def _configs(self) -> list[object]:
        held = (m.__dict__.get("config") for m in self.tree.modules.values())
        return list({id(config): config for config in held if config is not None}.values())

    def is_only_token_table(self, path: str) -> bool:
        """Return whether an embedding must be the token embedding.

        It must be if it has as many rows as the vocabulary or as a head has outputs, or if it is the only embedding.
        """
        rows = self.embeddings[path]
        heads = {
            shape[1]
            for p, m in self.tree.modules.items()
            if not self.nesting.in_layer(p) and (shape := matrix_shape(m))
        }
        others = [p for p in self.embeddings if p != path and not self.is_position(p)]
        return rows in self.configured("vocab_size") | heads or not others

    def is_head(self, site: Site) -> bool:
        """Return whether a matrix is an output head.

        It is if the model declares it, if it shares the weight of an embedding, or if its size and position show it.
        """
        if self.is_declared(site.module, "get_output_embeddings"):
            return True
        shape = matrix_shape(site.module)
        return shape is not None and (without_adapter(site.path) in self._heads or self.is_tied(site.module))

    @cached_property
    def _heads(self) -> set[str]:
        if self._declared("get_output_embeddings"):
            return set()
        attention = {self.tree.linear(path) for path, _ in self.projections}
        asked = any(hasattr(type(m), "get_output_embeddings") for m in self.tree.modules.values())
        return find_heads(self.tree, self.nesting, self.vocabularies, attention, asked)

    def is_tied(self, module: nn.Module) -> bool:
        """Whether a module's weight is also an embedding's."""
        weight = module._parameters.get("weight")
        return weight is not None and any(
            weight is self.tree.modules[path]._parameters.get("weight") for path in self.embeddings
        )

    @cached_property
    def heads(self) -> set[str]:
        """Modules that hold the declared output head and no attention or embedding: all in them is the head's."""
        found: set[str] = set()
        taken = {*self.nesting.around_attention, *(p for path in self.embeddings for p in ancestors(path))}
        for path, module in self.tree.modules.items():
            if self.is_declared(module, "get_output_embeddings"):
                found.update(p for p in ancestors(path) if p and p not in taken)
        return found

    # Mixers and layers
    # -----------------------------------------------------------------------------------------------------

    @cached_property
    def mixers(self) -> set[str]:
        """Paths of the sequence mixers with a state or a convolution."""
        return find_mixers(self.tree, self.attentions, self.nesting)

    @cached_property
    def layers(self) -> Layers:
        """The Transformer layers, and which matrices in them are feed-forward."""
        return Layers(self.tree, self.attentions)
