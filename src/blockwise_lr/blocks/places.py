"""Where in a model a module is: in a layer of a stack, or where embeddings and heads are; and its name within that.

Layers are known without attention: they are the numbered items of a list, or siblings whose names differ in their
number only. The names of the modules around a model say nothing about what is in it, so rules see a name only from
the nearest such place downwards.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import cached_property

from blockwise_lr.blocks.topology import CONTAINERS, Tree, ancestors

_NUMBERED = re.compile(r"(?P<stem>.*?)_?\d+")
# Experts lie in a list, too, and are no layers.
_NO_STACK = re.compile(r"(\w+_)?experts?")


class Places:
    """What is known about the place of a module from how the model is nested.

    Args:
        tree: the model's modules.
        attentions: the paths of its attention modules.
        tables: the paths of its embeddings outside of attention.
    """

    def __init__(self, tree: Tree, attentions: Collection[str], tables: Collection[str]) -> None:
        self.tree = tree
        self.around_attention = {path for attention in attentions for path in ancestors(attention)}
        self.around_table = {path for table in tables for path in ancestors(table)}
        self._attentions, self._tables = attentions, set(tables)

    @cached_property
    def core(self) -> str:
        """The model itself, without modules that hold nothing but one other module."""
        path = ""
        while len(inside := self._holding(path)) == 1 and path not in self.tree.owners:
            if self.tree.is_matrix(inside[0]) or inside[0] in self._attentions:
                break
            path = inside[0]
        return path

    @cached_property
    def layers(self) -> set[str]:
        """The outermost numbered modules that hold more than one module with parameters: the items of a stack.

        An item that holds an embedding and a stack of its own is a whole model, not a layer.
        """
        return set(self._items(self.core))

    @cached_property
    def attention_layers(self) -> set[str]:
        """The modules around an attention, up to the first container or embedding: layers, not stacks or models."""
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
        """Whether a module is part of a layer: what is in one is no output head of the model."""
        for around in ancestors(path):
            if around in self.layers:
                return True
            if around in self.around_attention:  # the nearest one around an attention is a layer, or a stack
                return around in self.attention_layers and path.rpartition(".")[0] != self.core
        return False

    def model_of(self, path: str) -> str | None:
        """The module around this one, containers aside, if it also holds an embedding."""
        modules = self.tree.modules
        around = next((p for p in ancestors(path) if not p or not isinstance(modules[p], CONTAINERS)), "")
        return around if around in self.around_table else None

    def local(self, path: str) -> str:
        """A module's path within the nearest layer, or, outside of layers, within the model.

        Modules around the model, or around its layers, have names that somebody chose for a whole model. They are
        left out.
        """
        around = next((p for p in (path, *ancestors(path)) if p in self._frames), "")
        return path.removeprefix(around).removeprefix(".") if around else path

    @cached_property
    def _frames(self) -> set[str]:
        frames = {"", self.core, *ancestors(self.core)}
        for layer in self.layers:
            if not all(
                map(self.tree.is_matrix, self._owners_in(layer))
            ):  # the name of a list of MLPs says so
                frames |= {layer, *ancestors(layer)}
        return frames | {
            path for path in self.around_table if path in self.around_attention or self._mixes(path)
        }

    def _mixes(self, path: str) -> bool:
        """Whether a module around an embedding holds several others, too: a model, not a module of embeddings."""
        rest = [p for p in self._holding(path) if p not in self._tables and not self.tree.is_norm(p)]
        return len(rest) > 1

    def _owners_in(self, path: str) -> Iterator[str]:
        if path in self.tree.owners:
            yield path
        for child in self._holding(path):
            yield from self._owners_in(child)

    def _holding(self, path: str) -> list[str]:
        return [child for child in self.tree.children.get(path, ()) if child in self.tree.holders]

    def _items(self, path: str) -> Iterator[str]:
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
        """A name without the number at its end; None without one."""
        found = _NUMBERED.fullmatch(path.rpartition(".")[2])
        return found["stem"] if found else None

    def _is_composite(self, path: str) -> bool:
        """Whether more than one module in it has parameters."""
        return not self.tree.is_matrix(path) and self.tree.holders[path] > 1

    def _is_model(self, path: str, siblings: int) -> bool:
        """Whether a module with a stack of its own also has an embedding, or is the only one in its list."""
        alone = siblings == 1
        holders = {table.rpartition(".")[0] for table in self._tables}
        inside = (p for p in holders if p == path or p.startswith(f"{path}."))
        if alone and any(map(self._mixes, inside)):
            return True  # without a stack, e.g. a recurrent network
        return (path in self.around_table or alone) and any(True for _ in self._items(path))
