"""Resolve the layout of every fused weight, or report why it is unknown.

The shape of a fused weight does not show its layout. `qkv(x).view(B, T, 3, H, D)` has all queries first, and
`qkv(x).view(B, T, H, 3, D)` has them head by head; the weight has the same shape in both. A layout must therefore come
from one of these sources, which are tried in this order:

1. `split_fused` has already split the weight;
2. the user states the layout of this weight (`layout=` with a key, or :func:`register_layout`);
3. the attention's class is trusted (`blocks/trusted_classes.py`);
4. a run of the model on the user's example batch shows the layout;
5. the user states one layout for all other weights (`layout=` without keys);
6. a run of a copy of the attention on random numbers shows the layout;
7. a run of the model on a random batch shows the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from blockwise_lr.blocks.attention_run import rows_of_attention
from blockwise_lr.blocks.autograd_layouts import (
    NotSeenError,
    Rows,
    UnresolvedWeight,
    layout_of,
    rows_of_run,
)
from blockwise_lr.blocks.layout import Layout, Projection
from blockwise_lr.blocks.layout_cache import cache_results, cached_results, settings_of
from blockwise_lr.blocks.model_runs import (
    call_with_example,
    has_forward,
    is_distributed,
    random_batch,
    real_device,
)
from blockwise_lr.blocks.topology import Tree, ancestors
from blockwise_lr.blocks.trusted_classes import is_trusted
from blockwise_lr.blocks.user_layouts import UserLayouts, registered_layout

Key = tuple[str, str]
"""A parameter: the path of the module that owns it, and its attribute name in this module."""

Unresolved = dict[str, dict[str, list[Key]]]
"""Path of an attention -> name of a fused layer -> its parameters, such as weight and bias, which share a layout."""


class LayoutResolver:
    """The projections of a model's attentions, with resolved layouts.

    Args:
        tree: the modules of the model.
        found: projections with the layouts that names and shapes suggest.
        split: `split(module, leaf)` returns the layout of a weight that is split, otherwise None.
        vocabularies: returns the sizes of the model's vocabularies. It is called only before a run on a random batch.
        stated: the layouts that the user states.
        example: the user's example batch. Default: none.

    Attributes:
        projections: the projections. An unknown layout has `repeats=None`.
        problems: the parameters whose layout is unknown, each with the reason.

    Raises:
        ValueError: the model does not run on the example, or a stated layout does not fit its weight.
    """

    def __init__(
        self,
        tree: Tree,
        found: Mapping[Key, Projection],
        split: Callable[[nn.Module, str], Layout | None],
        vocabularies: Callable[[], set[int]],
        stated: UserLayouts,
        example: Any = None,
    ) -> None:
        self._tree, self._vocabularies, self._example = tree, vocabularies, example
        self.projections = dict(found)
        self.problems: dict[Key, str] = {}
        unresolved: Unresolved = {}
        for key, projection in found.items():
            module, leaf = owner_of(tree, key[0]), key[1]
            if (layout := split(module, leaf)) is not None:
                self._set_layout([key], layout)
            elif projection.fused and (
                module._parameters.get(leaf) is not None or is_parametrized(module, leaf)
            ):
                unresolved.setdefault(projection.attention, {}).setdefault(_layer_name(key), []).append(key)
        names = [
            ".".join(filter(None, key))
            for layers in unresolved.values()
            for keys in layers.values()
            for key in keys
        ]
        for attention, layers in unresolved.items():
            for name, keys in list(layers.items()):
                if self._resolve_without_run(attention, keys, stated):
                    del layers[name]
        stated.check_used(names)
        remaining = {attention: layers for attention, layers in unresolved.items() if layers}
        if remaining:
            self._resolve_remaining(remaining, stated)

    def _set_layout(self, keys: Sequence[Key], layout: Layout) -> None:
        for key in keys:
            self.projections[key] = replace(self.projections[key], layout=layout)

    def _resolve_without_run(self, path: str, keys: Sequence[Key], stated: UserLayouts) -> bool:
        """Resolve a layout by sources 2 and 3 of the module docstring. Return whether one of them applies."""
        attention, key = self._tree.modules[path], keys[0]
        projection, child, width = self.projections[key], _child(key, path), self._width(key)
        name = ".".join(filter(None, key))
        layout = stated.keyed(name, attention, child, projection, width)
        layout = layout or registered_layout(attention, child, projection, width)
        if layout is not None:
            self._set_layout(keys, layout)
            return True
        return is_trusted(attention)  # the layout that names and shapes suggest is then correct

    def _resolve_remaining(self, remaining: Unresolved, stated: UserLayouts) -> None:
        """Resolve the remaining layouts by sources 4 to 7 of the module docstring, and record the problems."""
        reasons: dict[Key, str] = {}
        if self._example is not None:
            self._by_model_run(
                remaining,
                lambda: call_with_example(self._tree.modules[""], self._example),
                reasons,
                is_users_example=True,
            )
        for path, layers in remaining.items():  # source 5
            attention = self._tree.modules[path]
            for name, keys in list(layers.items()):
                projection, child = self.projections[keys[0]], _child(keys[0], path)
                if (layout := stated.default(attention, child, projection, self._width(keys[0]))) is not None:
                    self._set_layout(keys, layout)
                    del layers[name]
        self._by_attention_run(remaining, reasons)
        if self._example is None:
            self._by_random_batch(remaining, reasons)
        for layers in remaining.values():
            for keys in layers.values():
                for key in keys:
                    self.projections[key] = replace(
                        self.projections[key], layout=self.projections[key].layout._replace(repeats=None)
                    )
                    self.problems[key] = reasons.get(keys[0], "no attention was seen in it")

    def _by_attention_run(self, remaining: Unresolved, reasons: dict[Key, str]) -> None:
        """Resolve the layouts that a run of each attention alone shows. Attentions with equal settings run once."""
        by_settings: dict[Any, dict[str, Layout | str]] = {}
        for path, layers in remaining.items():
            attention = self._tree.modules[path]
            if is_distributed(attention) or not has_forward(attention):
                why = "has no forward that could be run alone" if not has_forward(attention) else "is sharded"
                for keys in layers.values():
                    reasons.setdefault(keys[0], f"its attention {why}")
                continue
            settings = settings_of(attention)
            results = cached_results(attention, settings) or by_settings.setdefault(settings, {})
            cache_results(attention, settings, results)
            owners = {name: keys[0][0] for name, keys in layers.items()}
            # Paths relative to the attention, so that attentions with equal settings can share the results. The path
            # is empty for a bare parameter of the attention.
            paths = {name: _relative(owner, path) for name, owner in owners.items()}
            to_run = {
                name: paths[name]
                for name, (key, *_) in layers.items()
                if key[1] in owner_of(self._tree, key[0])._parameters  # a parametrized weight is not in it
                and paths[name]
                and paths[name] not in results
            }
            if to_run:
                width = self._tree.shape(next(owners[name] for name in to_run))[0]
                try:
                    found: Mapping[str, Rows] = rows_of_attention(attention, to_run, width)
                except NotSeenError as why:
                    results.update({paths[name]: str(why) for name in to_run})
                else:
                    for name in to_run:
                        results[paths[name]] = self._read(found.get(name), self.projections[layers[name][0]])
            for name, keys in list(layers.items()):
                layout = results.get(paths[name], "it belongs to no linear layer, or is parametrized")
                if isinstance(layout, Layout):
                    self._set_layout(keys, layout)
                    del layers[name]
                else:
                    reasons.setdefault(keys[0], layout)

    def _by_random_batch(self, remaining: Unresolved, reasons: dict[Key, str]) -> None:
        """Resolve the layouts that a run on random tokens or images shows, if the model accepts either."""
        model = self._tree.modules[""]
        if any(remaining.values()) and (batch := random_batch(model, self._vocabularies)) is not None:
            with real_device():
                self._by_model_run(remaining, lambda: model(batch), reasons)

    def _by_model_run(
        self,
        remaining: Unresolved,
        run: Callable[[], object],
        reasons: dict[Key, str],
        is_users_example: bool = False,
    ) -> None:
        """Resolve the layouts that a run of the whole model shows.

        Args:
            remaining: the unresolved layers. Resolved ones are removed.
            run: runs the model.
            reasons: gets the reason for each layer that stays unresolved.
            is_users_example: whether `run` uses the user's example. A failure of the run is then an error.
        """
        modules = self._tree.modules
        names = {id(module): name for name, module in modules[""].named_modules()}
        to_run: dict[str, dict[str, UnresolvedWeight]] = {}
        for path, layers in remaining.items():
            for keys in layers.values():
                weight = owner_of(self._tree, keys[0][0])._parameters.get(keys[0][1])
                if weight is not None:
                    fused = UnresolvedWeight(weight, self.projections[keys[0]].dim)
                    # Hooks run only on modules that are called.
                    called = next(p for p in (path, *ancestors(path)) if not p or has_forward(modules[p]))
                    to_run.setdefault(names[id(modules[called])], {})[".".join(keys[0])] = fused
        try:
            found = rows_of_run(modules[""], to_run, run) if to_run else {}
        except NotSeenError as why:
            if is_users_example:
                raise ValueError(
                    f"the model cannot be run on example=: {why}; expected what the model takes: a mapping is given as "
                    "keywords, a tuple as arguments, anything else as the one argument"
                ) from why
            return
        for path, layers in remaining.items():
            for name, keys in list(layers.items()):
                layout = self._read(found.get(".".join(keys[0])), self.projections[keys[0]])
                if isinstance(layout, Layout):
                    self._set_layout(keys, layout)
                    settings = settings_of(modules[path])
                    results = cached_results(modules[path], settings) | {_relative(keys[0][0], path): layout}
                    cache_results(modules[path], settings, results)
                    del layers[name]
                elif is_users_example or keys[0] not in reasons or ".".join(keys[0]) in found:
                    reasons[keys[0]] = layout  # otherwise an earlier run has a better reason

    def _width(self, key: Key) -> int:
        """Return the number of outputs of a fused weight."""
        projection = self.projections[key]
        parameter = owner_of(self._tree, key[0])._parameters.get(key[1])
        if parameter is None:
            return sum(size for _, size in projection.parts)
        return int(parameter.shape[projection.dim])

    @staticmethod
    def _read(rows: Rows | None, projection: Projection) -> Layout | str:
        """Return the layout that the rows of a weight show, or the reason why they show none."""
        if rows is None:
            return "no attention was seen in it"
        try:
            return layout_of(rows, [part for part, _ in projection.parts])
        except NotSeenError as why:
            return str(why)


def _layer_name(key: Key) -> str:
    """Return the name of a parameter's fused layer: a linear layer, or the parameter itself if it is in none."""
    path, leaf = key
    return path if leaf in ("weight", "bias") else ".".join(filter(None, key))


def _child(key: Key, attention: str) -> str:
    """Return the attribute name of the weight's linear layer, or of a weight that the attention owns itself."""
    return key[1] if key[0] == attention else key[0].rpartition(".")[2]


def owner_of(tree: Tree, path: str) -> nn.Module:
    """Return the module that holds a linear layer's parameters. For an adapter of PEFT this is its `base_layer`."""
    return tree.modules.get(f"{path}.base_layer", tree.modules[path])


def _relative(path: str, attention: str) -> str:
    """Return the path of a module relative to its attention."""
    return path[len(attention) + 1 if attention else 0 :]
