"""Find the layout of a fused weight by autograd: which of queries, keys and values each row affects in a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from blockwise_lr.blocks.attention_inputs import AttentionInputs, record_attention
from blockwise_lr.blocks.layout import Layout
from blockwise_lr.blocks.model_runs import restored_buffers


class UnresolvedWeight(NamedTuple):
    """A fused weight whose layout is unknown.

    Args:
        weight: the parameter.
        dim: the dimension along which its parts are arranged.
    """

    weight: nn.Parameter
    dim: int


Rows = list[frozenset[str]]
"""What each row of a weight affects: a set of "q", "k" and "v"."""


class NotSeenError(Exception):
    """A forward pass did not show the layout. The message is the reason, in words."""


def rows_of_run(
    model: nn.Module, attentions: Mapping[str, Mapping[str, UnresolvedWeight]], run: Callable[[], object]
) -> dict[str, Rows]:
    """Return what the rows of fused weights affect while `run` runs the model.

    If an attention runs several times, only the first run counts, because its own output affects the later ones.

    Args:
        model: the model that contains the attentions.
        attentions: path of each attention -> name -> fused weight.
        run: calls the model. An exception in it is ignored once an attention was seen.

    Returns:
        By name, the rows of the weights whose attention was seen.

    Raises:
        NotSeenError: `run` raised an exception before any attention was seen.
    """
    seen: dict[str, list[tuple[AttentionInputs, dict[str, dict[str, Tensor]]]]] = {}
    finished: set[str] = set()
    stack: list[str] = []

    def record(taken: AttentionInputs) -> None:
        if stack and stack[-1] not in finished:
            weights = attentions[stack[-1]]
            affected = {part: _gradients(tensor, weights) for part, tensor in zip("qkv", taken[:3])}
            if any(gradients for gradients in affected.values()):
                seen.setdefault(stack[-1], []).append((taken, affected))

    with ExitStack() as exits:
        for path in attentions:
            module = model.get_submodule(path)
            enter = module.register_forward_pre_hook(lambda *_, path=path: stack.append(path))
            leave = module.register_forward_hook(lambda *_: finished.add(stack.pop()), always_call=True)
            exits.callback(enter.remove)
            exits.callback(leave.remove)
        exits.enter_context(
            _undisturbed(model, [f.weight for each in attentions.values() for f in each.values()])
        )
        exits.enter_context(record_attention(model, record))
        try:
            run()
        except Exception as error:
            if not seen:
                raise NotSeenError(
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                ) from error
    found: dict[str, Rows] = {}
    for path, events in seen.items():
        computed = [affected for taken, affected in events if not taken.by_name]
        for name, fused in attentions[path].items():
            found[name] = _rows(fused, computed or [affected for _, affected in events], name)
    return found


def layout_of(rows: Rows, expected: Sequence[str]) -> Layout:
    """Return the layout that the rows show.

    Args:
        rows: what each row affects.
        expected: the parts that the weight should make. They tell whether rows that affect both keys and values are a
            latent, and whether rows that affect nothing are a gate or the output projection.

    Raises:
        NotSeenError: rows make nothing known; queries, keys or values have no row; or the parts do not follow each
            other in a repeated order.

    Example:
        >>> layout_of([frozenset(part) for part in "qqkvqqkv"], ("q", "k", "v"))
        Layout(parts=(('q', 4), ('k', 2), ('v', 2)), repeats=2)
    """
    shared = "latent" if "latent" in expected else "kv"
    names: dict[frozenset[str], str] = {frozenset(part): part for part in "qkv"} | {frozenset("kv"): shared}
    silent = [part for part in expected if part in ("gate", "o")]
    if len(silent) == 1:
        names[frozenset()] = silent[0]
    unknown = [i for i, affected in enumerate(rows) if affected not in names]
    if unknown:
        words = (
            " and ".join(_WORDS[part] for part in "qkv" if part in rows[unknown[0]]) or "nothing that attends"
        )
        raise NotSeenError(f"{len(unknown)} of its {len(rows)} rows, row {unknown[0]} first, move {words}")
    owners = [names[affected] for affected in rows]
    unmoved = [_WORDS[part] for part in "qkv" if part in expected and part not in owners]
    if unmoved and frozenset() in rows:  # rows that seem to be a gate or an output may belong to these parts
        raise NotSeenError(f"none of its {len(rows)} rows moves {' or '.join(unmoved)} alone")
    for repeats in (n for n in range(1, len(owners) + 1) if len(owners) % n == 0):
        stretch = owners[: len(owners) // repeats]
        runs = [(part, len(list(same))) for part, same in groupby(stretch)]
        if len({part for part, _ in runs}) == len(runs) and stretch * repeats == owners:
            return Layout(tuple((part, length * repeats) for part, length in runs), repeats)
    raise NotSeenError(f"its parts follow no repeated order: {_shown(owners)}")


_WORDS = {"q": "queries", "k": "keys", "v": "values"}


def _shown(owners: list[str]) -> str:
    runs = [f"{len(list(same))} {part}" for part, same in groupby(owners)]
    return ", ".join(runs[:8]) + (", ..." if len(runs) > 8 else "")


def _gradients(tensor: Tensor, weights: Mapping[str, UnresolvedWeight]) -> dict[str, Tensor]:
    """Return the gradients of the weights for a random projection of an attention input."""
    if not tensor.requires_grad or not tensor.is_floating_point():
        return {}
    total = (tensor.nan_to_num(0, 0, 0) * torch.randn_like(tensor)).sum()
    each = [fused.weight for fused in weights.values()]
    found = torch.autograd.grad(total, each, retain_graph=True, allow_unused=True)
    return {name: gradient for name, gradient in zip(weights, found) if gradient is not None}


def _rows(fused: UnresolvedWeight, events: Sequence[Mapping[str, Mapping[str, Tensor]]], name: str) -> Rows:
    """Return what each row of a weight affects: it affects an input if it has a nonzero gradient for it."""
    affected: Rows = [frozenset()] * fused.weight.shape[fused.dim]
    for event in events:
        for part, gradients in event.items():
            if (gradient := gradients.get(name)) is not None:
                moves = (gradient != 0).movedim(fused.dim, 0).flatten(1).any(1).tolist()
                affected = [each | {part} if moving else each for each, moving in zip(affected, moves)]
    return affected


@contextmanager
def _undisturbed(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Run in eval mode with gradients of these weights; restore modes, buffers and the random state afterwards."""
    modes = {module: module.training for module in model.modules()}
    trained = [weight.requires_grad for weight in weights]
    devices = {weight.device for weight in weights if weight.device.type == "cuda"}
    with (
        torch.random.fork_rng(devices=list(devices)),
        torch.inference_mode(False),
        torch.enable_grad(),
        restored_buffers(model),
    ):
        try:
            model.eval()
            for weight in weights:
                weight.requires_grad_(True)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for weight, flag in zip(weights, trained):
                weight.requires_grad_(flag)
