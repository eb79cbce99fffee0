"""Resolve the layout of every fused weight, or report why it is unknown.

The shape of a fused weight does not show its layout. `qkv(x).view(B, T, 3, H, D)` takes all queries first, and
`qkv(x).view(B, T, H, 3, D)` takes them head by head, from weights of one shape. So a layout must come from one of these
sources, tried in this order:

1. the weight is split already;
2. the user states it for this weight (`layout=` with a key, or :func:`register_layout`);
3. the attention's class is trusted (`blocks/trusted_classes.py`);
4. a run of the user's example batch shows it;
5. the user states it for all other weights (`layout=` without keys);
6. a run of a copy of the attention on random numbers shows it;
7. a run of the model on a random batch shows it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from blockwise_lr.blocks.autograd_layouts import (
    NotSeenError,
    Rows,
    UnresolvedWeight,
    layout_of,
    rows_of_attention,
    rows_of_run,
)
from blockwise_lr.blocks.layout import Layout, Projection
from blockwise_lr.blocks.topology import Tree, ancestors
from blockwise_lr.blocks.trusted_classes import is_trusted
from blockwise_lr.blocks.user_layouts import UserLayouts, registered_layout

_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule"}

Key = tuple[str, str]
"""A parameter: the path of the module that owns it, and its attribute name in this module."""

# Cache over calls. For an attention: its settings, and the layout of each of its linear layers or the reason why a run
# did not show it.
_PROVED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[str, Layout | str]]] = (
    weakref.WeakKeyDictionary()
)
# Models that were run on a random batch already. One run is enough.
_RUN: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class LayoutResolver:
    """The projections of a model's attentions, with resolved layouts.

    Args:
        tree: the modules of the model.
        found: projections with the layouts that names and shapes suggest.
        split: `split(module, leaf)` returns the layout of a weight that is split, otherwise None.
        tokens: returns the sizes of the model's vocabularies. It is called only before a run on random tokens.
        stated: the layouts that the user states.
        example: a batch of the user's. Default: none.

    Attributes:
        projections: the projections. Where a layout stays unknown, its `repeats` is None.
        problems: for each parameter whose layout is unknown, the reason.

    Raises:
        ValueError: the model does not run on the example, or a stated layout does not fit its weight.
    """

    def __init__(
        self,
        tree: Tree,
        found: Mapping[Key, Projection],
        split: Callable[[nn.Module, str], Layout | None],
        tokens: Callable[[], set[int]],
        stated: UserLayouts,
        example: Any = None,
    ) -> None:
        self._tree, self._tokens, self._example = tree, tokens, example
        self.projections = dict(found)
        self.problems: dict[Key, str] = {}
        unsettled: dict[str, dict[str, list[Key]]] = {}
        for key, projection in found.items():
            module, leaf = owner_of(tree, key[0]), key[1]
            if (done := split(module, leaf)) is not None:
                self._settle([key], done)
            elif projection.fused and (
                module._parameters.get(leaf) is not None or is_parametrized(module, leaf)
            ):
                unsettled.setdefault(projection.attention, {}).setdefault(_group(key), []).append(key)
        names = [
            ".".join(filter(None, key)) for g in unsettled.values() for keys in g.values() for key in keys
        ]
        for attention, groups in unsettled.items():
            for name, keys in list(groups.items()):
                if self._is_stated_or_trusted(attention, keys, stated):
                    del groups[name]
        stated.check_used(names)
        remaining = {attention: groups for attention, groups in unsettled.items() if groups}
        if remaining:
            self._prove(remaining, stated)

    def _settle(self, keys: Sequence[Key], layout: Layout) -> None:
        for key in keys:
            self.projections[key] = replace(self.projections[key], layout=layout)

    def _is_stated_or_trusted(self, path: str, keys: Sequence[Key], stated: UserLayouts) -> bool:
        """Settle a layout that the user states for this weight. Return whether it is stated, or its class trusted."""
        attention, key = self._tree.modules[path], keys[0]
        projection, child, width = self.projections[key], _child(key, path), self._width(key)
        name = ".".join(filter(None, key))
        layout = stated.keyed(name, attention, child, projection, width)
        layout = layout or registered_layout(attention, child, projection, width)
        if layout is not None:
            self._settle(keys, layout)
            return True
        return is_trusted(attention)

    # Proofs --------------------------------------------------------------------------------------

    def _prove(self, remaining: dict[str, dict[str, list[Key]]], stated: UserLayouts) -> None:
        """Settle the remaining layouts by sources 4 to 7 of the module docstring; record the problems."""
        reasons: dict[Key, str] = {}
        if self._example is not None:
            self._by_model_run(
                remaining, lambda: _call(self._tree.modules[""], self._example), reasons, given=True
            )
        for path, groups in remaining.items():
            attention = self._tree.modules[path]
            for name, keys in list(groups.items()):
                projection, child = self.projections[keys[0]], _child(keys[0], path)
                if (layout := stated.default(attention, child, projection, self._width(keys[0]))) is not None:
                    self._settle(keys, layout)
                    del groups[name]
        self._by_attention_run(remaining, reasons)
        if self._example is None:
            self._by_random_batch(remaining, reasons)
        for groups in remaining.values():
            for keys in groups.values():
                for key in keys:
                    self.projections[key] = replace(
                        self.projections[key], layout=self.projections[key].layout._replace(repeats=None)
                    )
                    self.problems[key] = reasons.get(keys[0], "no attention was seen in it")

    def _by_attention_run(self, remaining: dict[str, dict[str, list[Key]]], reasons: dict[Key, str]) -> None:
        """Settle the layouts that a run of each attention alone shows. Attentions with equal settings run once."""
        alike: dict[Any, dict[str, Layout | str]] = {}
        for path, groups in remaining.items():
            attention = self._tree.modules[path]
            if is_distributed(attention) or not has_forward(attention):
                why = "has no forward that could be run alone" if not has_forward(attention) else "is sharded"
                for keys in groups.values():
                    reasons.setdefault(keys[0], f"its attention {why}")
                continue
            settings = _settings(attention)
            known = _proved(attention, settings) or alike.setdefault(settings, {})
            _PROVED[attention] = settings, known
            owners = {name: keys[0][0] for name, keys in groups.items()}
            inside = {name: _relative(owner, path) for name, owner in owners.items()}
            here = {
                name
                for name, keys in groups.items()
                if keys[0][1] in owner_of(self._tree, keys[0][0])._parameters
            }
            asked = {name: inside[name] for name in here if inside[name] and inside[name] not in known}
            if asked:
                width = self._tree.shape(next(owners[name] for name in asked))[0]
                try:
                    found: Mapping[str, Rows] = rows_of_attention(attention, asked, width)
                except NotSeenError as why:
                    known.update({inside[name]: str(why) for name in asked})
                else:
                    for name in asked:
                        known[inside[name]] = self._read(found.get(name), self.projections[groups[name][0]])
            for name, keys in list(groups.items()):
                layout = known.get(inside[name], "it belongs to no linear layer, or is parametrized")
                if isinstance(layout, Layout):
                    self._settle(keys, layout)
                    del groups[name]
                else:
                    reasons.setdefault(keys[0], layout)

    def _by_random_batch(self, remaining: dict[str, dict[str, list[Key]]], reasons: dict[Key, str]) -> None:
        """Settle the layouts that a run of the model on random tokens or images shows, if it takes either."""
        model = self._tree.modules[""]
        parameter = next(model.parameters(), None)
        if not any(remaining.values()) or parameter is None or parameter.is_meta or is_distributed(model):
            return
        vocabulary = min(self._tokens(), default=0)
        images = getattr(model, "default_cfg", None)  # timm's models keep the image size here
        generator = torch.Generator().manual_seed(0)
        if vocabulary:
            batch = torch.randint(vocabulary, (2, 6), generator=generator, device="cpu")
        elif isinstance(images, Mapping) and "input_size" in images:
            batch = torch.randn(1, *images["input_size"], generator=generator, device="cpu").to(
                parameter.dtype
            )
        else:
            return
        if model not in _RUN:
            _RUN.add(model)
            with real_device():
                self._by_model_run(remaining, lambda: model(batch.to(parameter.device)), reasons)

    def _by_model_run(
        self,
        remaining: dict[str, dict[str, list[Key]]],
        run: Callable[[], object],
        reasons: dict[Key, str],
        given: bool = False,
    ) -> None:
        """Settle the layouts that `run`, a run of the whole model, shows.

        Args:
            given: whether it runs the user's example. If so, a failure is an error.
        """
        modules = self._tree.modules
        names = {id(module): name for name, module in modules[""].named_modules()}
        asked: dict[str, dict[str, UnresolvedWeight]] = {}
        for path, groups in remaining.items():
            for keys in groups.values():
                weight = owner_of(self._tree, keys[0][0])._parameters.get(keys[0][1])
                if weight is not None:
                    fused = UnresolvedWeight(weight, self.projections[keys[0]].dim)
                    runs = next(p for p in (path, *ancestors(path)) if not p or has_forward(modules[p]))
                    asked.setdefault(names[id(modules[runs])], {})[".".join(keys[0])] = fused
        try:
            found = rows_of_run(modules[""], asked, run) if asked else {}
        except NotSeenError as why:
            if given:
                raise ValueError(
                    f"the model cannot be run on example=: {why}; expected what the model takes: a mapping is given as "
                    "keywords, a tuple as arguments, anything else as the one argument"
                ) from why
            return
        for path, groups in remaining.items():
            for name, keys in list(groups.items()):
                layout = self._read(found.get(".".join(keys[0])), self.projections[keys[0]])
                if isinstance(layout, Layout):
                    self._settle(keys, layout)
                    settings = _settings(modules[path])
                    proved = _proved(modules[path], settings) | {_relative(keys[0][0], path): layout}
                    _PROVED[modules[path]] = settings, proved
                    del groups[name]
                elif given or keys[0] not in reasons or ".".join(keys[0]) in found:
                    reasons[keys[0]] = layout

    def _width(self, key: Key) -> int:
        """Return the number of outputs of a fused weight."""
        projection = self.projections[key]
        parameter = owner_of(self._tree, key[0])._parameters.get(key[1])
        if parameter is None:
            return sum(size for _, size in projection.parts)
        return int(parameter.shape[projection.dim])

    @staticmethod
    def _read(rows: Rows | None, projection: Projection) -> Layout | str:
        """Return the layout that the rows show, or the reason why they show none."""
        if rows is None:
            return "no attention was seen in it"
        try:
            return layout_of(rows, [part for part, _ in projection.parts])
        except NotSeenError as why:
            return str(why)


def has_forward(module: nn.Module) -> bool:
    """Return whether a module can be called. Containers such as nn.ModuleList cannot."""
    return type(module).forward is not nn.Module.forward or "forward" in module.__dict__


def is_distributed(module: nn.Module) -> bool:
    """Return whether the module is wrapped or sharded, so that a run or a copy involves other processes."""
    classes = {cls.__name__ for each in module.modules() for cls in type(each).__mro__}
    return bool(classes & _WRAPPERS) or any(hasattr(p, "placements") for p in module.parameters())


def _group(key: Key) -> str:
    """Return the name of the group of parameters with one layout: a linear layer, or a bare parameter."""
    path, leaf = key
    return path if leaf in ("weight", "bias") else ".".join(filter(None, key))


def _child(key: Key, attention: str) -> str:
    """Return the attribute name, in the attention, of the weight's linear layer or of the bare weight."""
    return key[1] if key[0] == attention else key[0].rpartition(".")[2]


def owner_of(tree: Tree, path: str) -> nn.Module:
    """Return the module that holds a linear layer's parameters. For an adapter of PEFT this is its `base_layer`."""
    return tree.modules.get(f"{path}.base_layer", tree.modules[path])


def _relative(path: str, attention: str) -> str:
    """Return the path of a module relative to its attention."""
    return path[len(attention) + 1 if attention else 0 :]


def _proved(attention: nn.Module, settings: Any) -> dict[str, Layout | str]:
    """Return the cached layouts of an attention, if its settings are the same as when they were proved."""
    before, known = _PROVED.get(attention, (None, {}))
    return known if before == settings else {}


def _settings(attention: nn.Module) -> Any:
    """Return what determines the layouts of an attention. Two attentions with equal settings have equal layouts."""
    own = {
        name: value for name, value in attention.__dict__.items() if name != "training" and name[:1] != "_"
    }
    plain = (bool, int, float, str, type(None))
    values = tuple(
        (name, repr(value) if isinstance(value, plain) else id(value)) for name, value in own.items()
    )
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in attention.named_parameters())
    inside = tuple((name, type(module)) for name, module in attention.named_modules())
    return type_before_parametrizations(attention), values, shapes, inside


def real_device() -> AbstractContextManager[object]:
    """Return a context in which new tensors are real, even if the caller builds models on the meta device."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


def _call(model: nn.Module, example: Any) -> object:
    """Run the model on an example: a mapping as keywords, a sequence as arguments, anything else as one argument."""
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, (tuple, list)) and not isinstance(example, Tensor):
        return model(*example)
    return model(example)
