"""Train many arms of one shape as one batch: functional_call and vmap over weights that are stacked along a first axis.

Each arm ends where it would end alone: tests/studies/test_horizon.py holds it to transformers' model, torch's AdamW and
the library's schedule. On a GPU a model of two million parameters uses a hundredth of the card, so a stack of arms
costs little more than one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from arms import Arm
from shapes import blocks_of, build
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from transformers import LlamaForCausalLM, PreTrainedModel

from blockwise_lr.files import storing

BETA1, EPS = 0.9, 1e-8


@dataclass(frozen=True)
class Text:
    """Windows of tokens, (windows, context), of the splits: train, tune (chooses settings), val (is reported)."""

    train: npt.NDArray[np.uint16]
    tune: npt.NDArray[np.uint16]
    val: npt.NDArray[np.uint16]

    def order(self, seed: int, windows: int) -> npt.NDArray[np.int64]:
        """Return which windows a run reads, no window twice.

        Raises:
            ValueError: the text is too short for the run.
        """
        if windows > len(self.train):
            raise ValueError(
                f"the run reads {windows} windows and the text has {len(self.train)}: give more text or fewer steps"
            )
        return np.random.default_rng(seed).permutation(len(self.train))[:windows]


def _loss(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
) -> Tensor:
    """The model's mean loss at these weights."""
    return cast("Tensor", functional_call(model, (weights, buffers), (), inputs).loss)


_compiled_loss = torch.compile(_loss, dynamic=False)


@cache
def _kept(shape: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """One model of a shape for all runs of the process: torch.compile compiles for every module anew."""
    return build(shape, seed=0).to(device, dtype)


class Stack:
    """Arms of one shape and one number of steps, with their weights, moments and place in the run.

    Args:
        arms: of equal shape and steps.
        text: the windows.
        rows: windows of one step.
        device, dtype: where and how to compute.
        compiled: compute the loss of an arm that is alone by torch.compile, which is faster on a CPU and rounds
            otherwise than the plain code.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        text: Text,
        *,
        rows: int = 16,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        if len({(arm.shape, arm.steps) for arm in arms}) != 1:
            raise ValueError("the arms of a stack have one shape and one number of steps")
        self.arms, self.text, self.rows, self.device = list(arms), text, rows, device
        models = [build(arm.shape, seed=arm.seed).to(device, dtype) for arm in arms]
        self.compiled = compiled and len(arms) == 1
        self.model = _kept(arms[0].shape, device, dtype) if self.compiled else models[0]
        if isinstance(self.model, LlamaForCausalLM):
            self.model.set_attn_implementation("eager")  # vmap has no rule for the CPU's flash attention
        blocks = blocks_of(arms[0].shape, self.model)
        self.block_of = {name: blocks[name].value for name, _ in self.model.named_parameters()}
        weights = [dict(model.named_parameters()) for model in models]
        self.weights = {
            name: torch.stack([each[name].detach() for each in weights]) for name in self.block_of
        }
        self.first = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.step, self.seconds = 0, 0.0
        self.curves: list[list[list[float]]] = [[] for _ in arms]  # of each arm: [step, val loss]
        self.copying: list[list[list[float]]] = [[] for _ in arms]  # of each arm: [step, nats]
        self._buffers = dict(self.model.named_buffers())
        order = [text.order(arm.seed, arm.steps * rows) for arm in arms]
        self._order = np.stack(order)  # (arms, windows)

    def _loss(self, weights: Mapping[str, Tensor], ids: Tensor, **options: Any) -> Tensor:
        """The mean loss of one arm on its own (rows, context) tokens; `options` may have other labels than they are."""
        inputs = {"input_ids": ids, "labels": ids, **options}
        loss = _compiled_loss if self.compiled and "labels" not in options else _loss
        return loss(self.model, weights, self._buffers, inputs)

    def _losses(self, ids: Tensor, **options: Any) -> Tensor:
        """The mean loss of every arm on the same tokens, without what a mixture of experts adds in training."""
        if hasattr(self.model.config, "output_router_logits"):
            options["output_router_logits"] = False
        if len(self.arms) > 1:
            return vmap(partial(self._loss, **options), in_dims=(0, None))(self.weights, ids)
        # Alone without vmap, so that models train for which it has no rule.
        return self._loss({name: weight[0] for name, weight in self.weights.items()}, ids, **options)[None]

    def _gradients(self, ids: Tensor) -> dict[str, Tensor]:
        """Return the gradients of every arm, stacked. One arm alone goes without vmap, which costs it a fifth."""
        if len(self.arms) > 1:
            gradients = vmap(grad_and_value(self._loss), in_dims=(0, 0))
            return cast("dict[str, Tensor]", gradients(self.weights, ids)[0])
        weights = {name: weight[0].detach().requires_grad_() for name, weight in self.weights.items()}
        with torch.enable_grad():
            loss = self._loss(weights, ids[0])
        found = torch.autograd.grad(loss, list(weights.values()))
        return {name: gradient.unsqueeze(0) for name, gradient in zip(weights, found)}

    def _each(self, values: Sequence[float], like: Tensor) -> Tensor:
        """One value an arm, shaped so that it multiplies the arms of a stacked tensor."""
        found = torch.tensor(values, dtype=like.dtype, device=self.device)
        return found.view(-1, *(1,) * (like.ndim - 1))

    @torch.no_grad()
    def advance(self) -> None:
        """Take one optimizer step of every arm: AdamW on gradients that are clipped as a whole, as torch does both."""
        chosen = self._order[:, self.step * self.rows : (self.step + 1) * self.rows]
        ids = torch.from_numpy(self.text.train[chosen].astype(np.int64)).to(self.device)
        gradients = self._gradients(ids)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
        limits = torch.tensor([arm.clip for arm in self.arms], dtype=norms.dtype, device=self.device)
        scales = (limits / (norms + 1e-6)).clamp(max=1.0)
        for name, weight in self.weights.items():
            block = self.block_of[name]
            rates = [arm.lr(block, self.step) for arm in self.arms]
            decays = [arm.weight_decay_of(block, self.step) for arm in self.arms]
            beta2 = self._each([arm.beta2 for arm in self.arms], weight)
            gradient = gradients[name].mul_(scales.view(-1, *(1,) * (weight.ndim - 1)))
            first, second = self.first[name], self.second[name]
            weight.mul_(self._each([1 - lr * decay for lr, decay in zip(rates, decays)], weight))
            first.lerp_(gradient, 1 - BETA1)
            second.mul_(beta2).add_((1 - beta2) * gradient.square())
            sizes = [lr / (1 - BETA1 ** (self.step + 1)) for lr in rates]
            roots = [(1 - arm.beta2 ** (self.step + 1)) ** 0.5 for arm in self.arms]
            denominator = second.sqrt().div_(self._each(roots, weight)).add_(EPS)
            weight.sub_(first.div(denominator).mul_(self._each(sizes, weight)))
        self.step += 1

    @torch.no_grad()
    def evaluate(self, windows: npt.NDArray[np.uint16], most: int) -> list[float]:
        """Return each arm's mean loss in nats on at most that many windows, evenly spaced over the split."""
        chosen = windows[np.arange(min(most, len(windows))) * len(windows) // min(most, len(windows))]
        total = torch.zeros(len(self.arms), dtype=torch.float64)
        for begin in range(0, len(chosen), self.rows):
            ids = torch.from_numpy(chosen[begin : begin + self.rows].astype(np.int64)).to(self.device)
            total += self._losses(ids).double().cpu() * len(ids)
        return cast("list[float]", (total / len(chosen)).tolist())

    @torch.no_grad()
    def copying_gain(self) -> list[float]:
        """Return by how many nats each arm's loss falls when random tokens come a second time in a window.

        It is 0 until the model has attention heads that find what came after the same token (induction heads).
        """
        half = self.text.val.shape[1] // 2
        generator = torch.Generator().manual_seed(0)
        once = torch.randint(self.model.config.vocab_size, (self.rows, half), generator=generator)
        ids = once.repeat(1, 2).to(self.device)
        first, second = ids.clone(), ids.clone()
        first[:, half:] = -100
        second[:, : half + 1] = -100  # nothing tells where the second time begins
        return cast(
            "list[float]", (self._losses(ids, labels=first) - self._losses(ids, labels=second)).tolist()
        )

    def run(
        self, *, checkpoint: Path | None = None, every_seconds: float = 300, points: int = 24
    ) -> list[dict[str, Any]]:
        """Train to the end, from the checkpoint if there is one, and return each arm's result.

        Args:
            checkpoint: a file for the state; it is removed at the end.
            every_seconds: between two writes of it.
            points: validation losses along the run.

        Returns:
            Of each arm ``{"arm", "tune_loss", "val_loss", "curve", "copying", "seconds", "rows", "compiled"}``; a
            number that is not finite is None. "copying" is `copying_gain` along the run.
        """
        if checkpoint is not None and checkpoint.exists():
            self._load(torch.load(checkpoint, weights_only=True, map_location=self.device))
        steps = self.arms[0].steps
        begun, written = time.monotonic(), time.monotonic()
        before = self.seconds
        while self.step < steps:
            self.advance()
            self.seconds = before + time.monotonic() - begun
            if self.step % max(1, steps // points) == 0 and self.step < steps:
                for curve, loss in zip(self.curves, self.evaluate(self.text.val, 192)):
                    curve.append([self.step, rounded(loss)])
                for curve, gain in zip(self.copying, self.copying_gain()):
                    curve.append([self.step, rounded(gain)])
            if checkpoint is not None and time.monotonic() - written > every_seconds:
                with storing(checkpoint):
                    torch.save(self._state(), checkpoint.with_suffix(".tmp"))
                    checkpoint.with_suffix(".tmp").replace(checkpoint)
                written = time.monotonic()
        tune, val = (self.evaluate(split, 1024) for split in (self.text.tune, self.text.val))
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        return [
            {
                "arm": arm.to_dict(),
                "tune_loss": rounded(tune[i]),
                "val_loss": rounded(val[i]),
                "curve": self.curves[i],
                "copying": self.copying[i],
                "seconds": round(self.seconds, 1),
                "rows": self.rows,
                "compiled": self.compiled,
            }
            for i, arm in enumerate(self.arms)
        ]

    def _state(self) -> dict[str, Any]:
        kept = ("weights", "first", "second", "step", "seconds", "curves", "copying")
        return {name: getattr(self, name) for name in kept}

    def _load(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def rounded(loss: float) -> float | None:
    """Return a loss as a result holds it; None if it is not finite."""
    return round(loss, 5) if np.isfinite(loss) else None
