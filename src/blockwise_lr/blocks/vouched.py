"""Which layouts of fused weights are sure: a split, a statement, a class whose layout was proved, or a proof.

How the parts of a fused weight lie in it cannot be read off its shape. `qkv(x).view(B, T, 3, H, D)` has all queries
first, `qkv(x).view(B, T, H, 3, D)` has them head by head, and the weights look the same.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from blockwise_lr.blocks.interleaved import Layout
from blockwise_lr.blocks.projection import Projection
from blockwise_lr.blocks.rows import Fused, NotSeenError, Rows, layout_of, of_attention, of_run
from blockwise_lr.blocks.stated import StatedLayouts, registered
from blockwise_lr.blocks.topology import Tree, ancestors

# Model folders of transformers 5.23: the tests prove those of language models by function, the others (images, speech)
# were read. Their layout is in `blocks/interleaved.py`, or is one part after another.
_TRANSFORMERS = re.compile(
    r"transformers\.models\.(axk[12]|bailing_hybrid|blip|blip_2|bloom|codegen|cohere_compass|dbrx|deberta"
    r"|decision_transformer|deepseek_ocr2|deepseek_v([234]|32)|dots3_note|ernie4_5_vl_moe|evolla|exaone4_5|falcon"
    r"|florence2|glm4_moe_lite|glm4v|glm4v_moe|glm5_next|glm_image|glm_moe_dsa|glm_ocr|got_ocr2|gpt2|gpt_bigcode|gpt_neox"
    r"|gpt_neox_japanese|granite_speech|granite_speech_plus|hiera|hy_v4|imagegpt|instructblip|instructblipvideo|jetmoe"
    r"|kimi_linear|longcat_flash|mgp_str|minicpm3|minimax|modernbert|mpt|openai|persimmon|phi3|phi4_multimodal"
    r"|pp_formulanet|pp_ocrv5_mobile_rec|pp_ocrv5_server_rec|pp_ocrv6_small_rec|qwen2_5_vl|qwen2_vl|qwen3_5|qwen3_5_moe"
    r"|qwen3_next|qwen3_omni_moe|qwen3_vl|qwen3_vl_moe|qwen4_exp|sam|sam2|sam_hq|seggpt|slanext|timesformer"
    r"|unlimited_ocr|vitdet|youtu)\..*"
)
_CLASSES = re.compile(
    r"timm\.layers\.attention\.Attention|timm\.layers\.attention_pool\.AttentionPoolLatent"
    r"|timm\.models\.(vision_transformer|beit)\.Attention|timm\.models\.swin_transformer(_v2)?\.WindowAttention"
    r"|timm\.models\.eva\.EvaAttention|litgpt\.model\.CausalSelfAttention"
)
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule"}

Key = tuple[str, str]
"""Path of the module that owns a parameter, and the parameter's own name."""

# Attention -> its settings, and path of a linear layer in it -> its layout, or why it could not be proved.
_PROVED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[str, Layout | str]]] = (
    weakref.WeakKeyDictionary()
)
# Models that were run on a random batch.
_RUN: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Vouched:
    """The projections of a model's attentions with the layouts of fused weights that are sure.

    Args:
        tree: the model.
        found: projections with the layouts that names and shapes suggest.
        split: the layout of a weight that is split already, None if it is not.
        tokens: sizes of the vocabularies, for a model that takes token ids; called when all else fails.
        stated: the user's layouts.
        example: a batch of the user's, or None.

    Raises:
        ValueError: the model cannot be run on the example, or a stated layout does not fit.
    """

    def __init__(
        self,
        tree: Tree,
        found: Mapping[Key, Projection],
        split: Callable[[nn.Module, str], Layout | None],
        tokens: Callable[[], set[int]],
        stated: StatedLayouts,
        example: Any = None,
    ) -> None:
        self._tree, self._tokens, self._example = tree, tokens, example
        self.projections = dict(found)
        self.problems: dict[Key, str] = {}
        open_: dict[str, dict[str, list[Key]]] = {}
        for key, projection in found.items():
            module, leaf = owner_of(tree, key[0]), key[1]
            if (done := split(module, leaf)) is not None:
                self._settle([key], done)
            elif projection.fused and (
                module._parameters.get(leaf) is not None or is_parametrized(module, leaf)
            ):
                open_.setdefault(projection.attention, {}).setdefault(_group(key), []).append(key)
        names = [".".join(filter(None, key)) for g in open_.values() for keys in g.values() for key in keys]
        for attention, groups in open_.items():
            for name, keys in list(groups.items()):
                if self._is_settled(attention, keys, stated):
                    del groups[name]
        stated.check_used(names)
        left = {attention: groups for attention, groups in open_.items() if groups}
        if left:
            self._prove(left, stated)

    def _settle(self, keys: Sequence[Key], layout: Layout) -> None:
        for key in keys:
            self.projections[key] = replace(self.projections[key], parts=layout.parts, repeats=layout.repeats)

    def _is_settled(self, path: str, keys: Sequence[Key], stated: StatedLayouts) -> bool:
        """Whether the user has said how this weight lies, or its class is known."""
        attention, key = self._tree.modules[path], keys[0]
        projection, child, width = self.projections[key], _child(key, path), self._width(key)
        name = ".".join(filter(None, key))
        said = stated.keyed(name, attention, child, projection, width)
        said = said or registered(attention, child, projection, width)
        if said is not None:
            self._settle(keys, said)
            return True
        return is_known(attention)

    # Proofs --------------------------------------------------------------------------------------

    def _prove(self, left: dict[str, dict[str, list[Key]]], stated: StatedLayouts) -> None:
        """By the user's example; else stated for all; else alone; else by a model that takes token ids."""
        reasons: dict[Key, str] = {}
        if self._example is not None:
            self._by_run(left, lambda: _call(self._tree.modules[""], self._example), reasons, given=True)
        for path, groups in left.items():
            attention = self._tree.modules[path]
            for name, keys in list(groups.items()):
                projection, child = self.projections[keys[0]], _child(keys[0], path)
                if (said := stated.rest(attention, child, projection, self._width(keys[0]))) is not None:
                    self._settle(keys, said)
                    del groups[name]
        self._alone(left, reasons)
        if self._example is None:
            self._by_random_batch(left, reasons)
        for groups in left.values():
            for keys in groups.values():
                for key in keys:
                    self.projections[key] = replace(self.projections[key], repeats=None)
                    self.problems[key] = reasons.get(keys[0], "no attention was seen in it")

    def _alone(self, left: dict[str, dict[str, list[Key]]], reasons: dict[Key, str]) -> None:
        alike: dict[Any, dict[str, Layout | str]] = {}
        for path, groups in left.items():
            attention = self._tree.modules[path]
            if is_sharded(attention) or not has_forward(attention):
                why = "has no forward that could be run alone" if not has_forward(attention) else "is sharded"
                for keys in groups.values():
                    reasons.setdefault(keys[0], f"its attention {why}")
                continue
            settings = _settings(attention)
            known = _proved(attention, settings) or alike.setdefault(settings, {})
            _PROVED[attention] = settings, known
            owners = {name: keys[0][0] for name, keys in groups.items()}
            inside = {name: _inside(owner, path) for name, owner in owners.items()}
            here = {
                name
                for name, keys in groups.items()
                if keys[0][1] in owner_of(self._tree, keys[0][0])._parameters
            }
            asked = {name: inside[name] for name in here if inside[name] and inside[name] not in known}
            if asked:
                width = self._tree.shape(next(owners[name] for name in asked))[0]
                try:
                    found: Mapping[str, Rows] = of_attention(attention, asked, width)
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

    def _by_random_batch(self, left: dict[str, dict[str, list[Key]]], reasons: dict[Key, str]) -> None:
        model = self._tree.modules[""]
        parameter = next(model.parameters(), None)
        if not any(left.values()) or parameter is None or parameter.is_meta or is_sharded(model):
            return
        vocabulary, images = min(self._tokens(), default=0), getattr(model, "default_cfg", None)  # timm's
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
                self._by_run(left, lambda: model(batch.to(parameter.device)), reasons)

    def _by_run(
        self,
        left: dict[str, dict[str, list[Key]]],
        run: Callable[[], object],
        reasons: dict[Key, str],
        given: bool = False,
    ) -> None:
        """Prove what a run of the whole model shows."""
        modules = self._tree.modules
        names = {id(module): name for name, module in modules[""].named_modules()}
        asked: dict[str, dict[str, Fused]] = {}
        for path, groups in left.items():
            for keys in groups.values():
                weight = owner_of(self._tree, keys[0][0])._parameters.get(keys[0][1])
                if weight is not None:
                    fused = Fused(weight, self.projections[keys[0]].dim)
                    runs = next(p for p in (path, *ancestors(path)) if not p or has_forward(modules[p]))
                    asked.setdefault(names[id(modules[runs])], {})[".".join(keys[0])] = fused
        try:
            found = of_run(modules[""], asked, run) if asked else {}
        except NotSeenError as why:
            if given:
                raise ValueError(
                    f"the model cannot be run on example=: {why}; expected what the model takes: a mapping is given as "
                    "keywords, a tuple as arguments, anything else as the one argument"
                ) from why
            return
        for path, groups in left.items():
            for name, keys in list(groups.items()):
                layout = self._read(found.get(".".join(keys[0])), self.projections[keys[0]])
                if isinstance(layout, Layout):
                    self._settle(keys, layout)
                    settings = _settings(modules[path])
                    proved = _proved(modules[path], settings) | {_inside(keys[0][0], path): layout}
                    _PROVED[modules[path]] = settings, proved
                    del groups[name]
                elif given or keys[0] not in reasons or ".".join(keys[0]) in found:
                    reasons[keys[0]] = layout

    def _width(self, key: Key) -> int:
        """Outputs of a fused weight."""
        projection = self.projections[key]
        parameter = owner_of(self._tree, key[0])._parameters.get(key[1])
        if parameter is None:
            return sum(size for _, size in projection.parts)
        return int(parameter.shape[projection.dim])

    @staticmethod
    def _read(rows: Rows | None, projection: Projection) -> Layout | str:
        if rows is None:
            return "no attention was seen in it"
        try:
            return layout_of(rows, [part for part, _ in projection.parts])
        except NotSeenError as why:
            return str(why)


def is_known(attention: nn.Module) -> bool:
    """Whether the class that defines an attention's forward is one whose layout was proved or read."""
    if isinstance(attention, nn.MultiheadAttention):
        return True
    of_class = type_before_parametrizations(attention)
    owner = next((cls for cls in of_class.__mro__ if "forward" in vars(cls)), of_class)
    forward = vars(owner).get("forward", owner)
    own = attention.__dict__.get("_old_forward", attention.__dict__.get("forward", forward))  # accelerate's
    if forward.__module__ != owner.__module__ or getattr(own, "__func__", own) is not forward:
        return False  # replaced
    name = f"{owner.__module__}.{owner.__qualname__}"
    return any(names.fullmatch(name) for names in (_TRANSFORMERS, _CLASSES))


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called: some only hold others."""
    return type(module).forward is not nn.Module.forward or "forward" in module.__dict__


def is_sharded(module: nn.Module) -> bool:
    """Whether running a module, or copying it, would be a step of several processes."""
    classes = {cls.__name__ for each in module.modules() for cls in type(each).__mro__}
    return bool(classes & _WRAPPERS) or any(hasattr(p, "placements") for p in module.parameters())


def _group(key: Key) -> str:
    """What shares a layout: a linear layer's weight and bias; each bare parameter by itself."""
    path, leaf = key
    return path if leaf in ("weight", "bias") else ".".join(filter(None, key))


def _child(key: Key, attention: str) -> str:
    """What the attention calls the weight's linear layer, or the weight itself."""
    return key[1] if key[0] == attention else key[0].rpartition(".")[2]


def owner_of(tree: Tree, path: str) -> nn.Module:
    """The module that holds a linear layer's parameters: inside of an adapter of PEFT, the layer that it adapts."""
    return tree.modules.get(f"{path}.base_layer", tree.modules[path])


def _inside(path: str, attention: str) -> str:
    """The path of a module as seen from the attention around it."""
    return path[len(attention) + 1 if attention else 0 :]


def _proved(attention: nn.Module, settings: Any) -> dict[str, Layout | str]:
    """What is known of an attention that has not changed since."""
    before, known = _PROVED.get(attention, (None, {}))
    return known if before == settings else {}


def _settings(attention: nn.Module) -> Any:
    """What decides a layout: equal for two attentions of one model if they compute the same of equal inputs."""
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
    """Whoever makes a model on the meta device has no tensors to run it on."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


def _call(model: nn.Module, example: Any) -> object:
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, (tuple, list)) and not isinstance(example, Tensor):
        return model(*example)
    return model(example)
