"""Nesting: which modules are in layers, and the names of modules relative to their layer.

Layers are found without looking at attention: they are the numbered items of a list, or siblings whose names differ
only by a number. The rules use a name relative to the nearest layer or model, because the names of the modules
around a model tell nothing about its contents.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import cached_property

from blockwise_lr.blocks.topology import CONTAINERS, Tree, ancestors

_NUMBERED = re.compile(r"(?P<stem>.*?)_?\d+")
# Experts are numbered, too, but are not layers.
_NO_STACK = re.compile(r"(\w+_)?experts?")


class Nesting:
    """Facts about the position of modules that follow from how the model is nested.

    Args:
        tree: the modules of the model.
        attentions: paths of the attention modules.
        tables: paths of the embeddings outside attention.

    Attributes:
        around_attention: paths of all modules that contain an attention.
        around_table: paths of all modules that contain an embedding.
    """

    def __init__(self, tree: Tree, attentions: Collection[str], tables: Collection[str]) -> None:
        self.tree = tree
        self.around_attention = {path for attention in attentions for path in ancestors(attention)}
        self.around_table = {path for table in tables for path in ancestors(table)}
        self._attentions, self._tables = attentions, set(tables)

    @cached_property
    def core(self) -> str:
        """Path of the model itself, inside modules that contain nothing but one other module."""
        path = ""
        while len(inside := self._holding(path)) == 1 and path not in self.tree.owners:
            if self.tree.is_matrix(inside[0]) or inside[0] in self._attentions:
                break
            path = inside[0]
        return path

    @cached_property
    def layers(self) -> set[str]:
        """The items of stacks: the outermost numbered modules with several modules that own parameters.

        An item with both an embedding and a stack of its own is a whole model, not a layer.
        """
        return set(self._items(self.core))

    @cached_property
    def attention_layers(self) -> set[str]:
        """The modules around an attention, up to the first container or embedding.

        These are layers and parts of layers, not stacks or models.
        """
        found: set[str] = set()
        for attention in self._attentions:
            for path in ancestors(attention):
                if path in self.around_table and path not in self.layers:
                    break
                found.add(path)
                if isinstance(self.tree.modules[path], CONTAINERS):
                    break
        return found

    def in_layer(self, path: str) -> bool:
        """Return whether a module is part of a layer. Such a module is not an output head of the model."""
        for around in ancestors(path):
            if around in self.layers:
                return True
            if around in self.around_attention:  # the nearest such module is a layer or a stack
                return around in self.attention_layers and path.rpartition(".")[0] != self.core
        return False

    def model_of(self, path: str) -> str | None:
        """Return the nearest module around `path`, except containers, if it contains an embedding; otherwise None."""
        modules = self.tree.modules
        around = next((p for p in ancestors(path) if not p or not isinstance(modules[p], CONTAINERS)), "")
        return around if around in self.around_table else None

    def local(self, path: str) -> str:
        """Return the path of a module relative to the nearest layer or, outside layers, to the model.

        The names of the modules around a model or its layers are left out, because users choose them for whole models.
        """
        around = next((p for p in (path, *ancestors(path)) if p in self._frames), "")
        return path.removeprefix(around).removeprefix(".") if around else path

    @cached_property
    def _frames(self) -> set[str]:
        """The modules to which paths are relative: the layers and the models, and everything around them."""
        frames = {"", self.core, *ancestors(self.core)}
        for layer in self.layers:
            # The name of a list of matrices describes them, so it stays in the relative path.
            if not all(map(self.tree.is_matrix, self._owners_in(layer))):
                frames |= {layer, *ancestors(layer)}
        return frames | {
            path for path in self.around_table if path in self.around_attention or self._mixes(path)
        }

    def _mixes(self, path: str) -> bool:
        """Return whether a module around an embedding contains several others, so it is a model, not an embedder."""
        rest = [p for p in self._holding(path) if p not in self._tables and not self.tree.is_norm(p)]
        return len(rest) > 1

    def _owners_in(self, path: str) -> Iterator[str]:
        """Yield the paths of all modules inside `path`, itself included, that own parameters."""
        if path in self.tree.owners:
            yield path
        for child in self._holding(path):
            yield from self._owners_in(child)

    def _holding(self, path: str) -> list[str]:
        """Return the direct children that contain parameters."""
        return [child for child in self.tree.children.get(path, ()) if child in self.tree.holders]

    def _items(self, path: str) -> Iterator[str]:
        """Yield the outermost layers inside `path`."""
        children = self._holding(path)
        stems = [(self._stem(child), type(self.tree.modules[child])) for child in children]
        is_stack = _NO_STACK.fullmatch(path.rpartition(".")[2]) is None
        for child, stem in zip(children, stems):
            numbered = stem[0] == "" or (stem[0] is not None and stems.count(stem) > 1)
            if (
                is_stack
                and numbered
                and self._is_composite(child)
                and not self._is_model(child, len(children))
            ):
                yield child
            else:
                yield from self._items(child)

    @staticmethod
    def _stem(path: str) -> str | None:
        """Return a module's name without the number at its end; None if it has no number."""
        found = _NUMBERED.fullmatch(path.rpartition(".")[2])
        return found["stem"] if found else None

    def _is_composite(self, path: str) -> bool:
        """Return whether several modules inside `path` own parameters."""
        return not self.tree.is_matrix(path) and self.tree.holders[path] > 1

    def _is_model(self, path: str, siblings: int) -> bool:
        """Return whether an item of a list is a whole model.

        It is if it contains a stack, and also an embedding or no siblings; or if it is alone and mixes several modules.
        """
        alone = siblings == 1
        holders = {table.rpartition(".")[0] for table in self._tables}
        inside = (p for p in holders if p == path or p.startswith(f"{path}."))
        if alone and any(map(self._mixes, inside)):
            return True  # a model without a stack, e.g. a recurrent network
        return (path in self.around_table or alone) and any(True for _ in self._items(path))
