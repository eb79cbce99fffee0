"""Layers: the Transformer layers around the attentions of a model, and the feed-forward matrices in them."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

from blockwise_lr.blocks.attention_names import is_attention_like
from blockwise_lr.blocks.topology import CONTAINERS, Site, Tree, ancestors, matrix_shape


class Layers:
    """The modules that contain an attention with no container in between: Transformer layers, not stacks.

    Args:
        tree: the modules of the model.
        attentions: paths of the attention modules.
    """

    def __init__(self, tree: Tree, attentions: Collection[str]) -> None:
        self._tree = tree
        self._around_attention = {path for attention in attentions for path in ancestors(attention)}
        self._paths: set[str] = set()
        for attention in attentions:
            for path in ancestors(attention):
                self._paths.add(path)
                if isinstance(tree.modules[path], CONTAINERS):
                    break

    def around(self, path: str) -> str | None:
        """Return the nearest module around `path` that contains an attention, if it is a layer and not a stack."""
        nearest = next((p for p in ancestors(path) if p in self._around_attention), None)
        return nearest if nearest in self._paths else None

    def widens_and_narrows(self, site: Site) -> bool:
        """Return whether a matrix is feed-forward by its shape.

        It is if it lies in a layer outside attention and widens d to m (or to 2m if gated), while another matrix of the
        layer narrows m to d; or the reverse.
        """
        layer, shape = self.around(site.path), matrix_shape(site.module)
        if layer is None or shape is None or not self._may_feed_forward(site.path, layer):
            return False
        (a, b), group = shape, self._matrices[layer]
        up = a < b and ((b, a) in group or (b % 2 == 0 and a < b // 2 and (b // 2, a) in group))
        down = b < a and ((b, a) in group or (b, 2 * a) in group)
        return up or down

    @cached_property
    def _matrices(self) -> dict[str, set[tuple[int, int]]]:
        """Layer -> the shapes of the matrices in it that may be feed-forward."""
        shapes: dict[str, set[tuple[int, int]]] = {}
        for path, module in self._tree.modules.items():
            layer, shape = self.around(path), matrix_shape(module)
            if layer is not None and shape is not None and self._may_feed_forward(path, layer):
                shapes.setdefault(layer, set()).add(shape)
        return shapes

    def _may_feed_forward(self, path: str, layer: str) -> bool:
        """Return whether a matrix is neither in a module like an attention nor in one with a mixer's state."""
        inside = [path]
        for p in ancestors(path):
            if p == layer:
                break
            inside.append(p)
        parent = next(ancestors(path))
        return self._tree.is_plain(parent) and not any(is_attention_like(self._tree, p) for p in inside)
