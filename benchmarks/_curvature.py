"""A model that is worth measuring, and every way of estimating the traces of its blocks, as one kind of function."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import curvlinops
import hessian_eigenthings
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockwise_lr import Block, BlockMap, classify, measure_sharpness, split_fused
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import TrainingStream, prepare_data
from blockwise_lr.sharpness.principle import PAPER_ORDER
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig

LR = 1e-3
MATVECS = 6  # products with the matrix in one run of hutch++ and xtrace: has to divide by 2 and 3


class Subject(NamedTuple):
    """A split model in eval mode, and the batch it is measured on."""

    model: nn.Module
    ids: Tensor
    blocks: BlockMap

    @property
    def batch(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "labels": self.ids}

    @property
    def present(self) -> list[Block]:
        """The paper's blocks."""
        counts = self.blocks.counts()
        return [block for block in PAPER_ORDER if block in counts]

    def names(self, block: Block) -> list[str]:
        return [name for name, _ in self.model.named_parameters() if self.blocks[name] is block]


def trained(config: ModelConfig, *, sequences: int, steps: int, text: bool) -> Subject:
    """A model after some steps of plain AdamW with a warm-up, so that its curvature is not that of the initialisation.

    Args:
        config: its shape.
        sequences: of each training batch, and of the batch to measure on, which it was not trained on.
        steps: trained for.
        text: on the embedded text; otherwise on random tokens, which takes no preparation.
    """
    torch.manual_seed(0)
    if text:
        data = prepare_data(DataConfig(), vocab_size=config.vocab_size, context=config.context)
        stream = TrainingStream(data.train, config.context, 0, n_samples=(steps + 1) * sequences)
        batches = [window["input_ids"] for window in torch.utils.data.DataLoader(stream, sequences)]
    else:
        batches = list(torch.randint(config.vocab_size, (steps + 1, sequences, config.context)))
    model = split_fused(build_model(config, seed=0)).train()
    # Without warm-up, or with the paper's ratios on top of this rate, attention saturates within these few steps.
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    for step, ids in enumerate(batches[:-1], start=1):
        optimizer.param_groups[0]["lr"] = LR * min(1.0, step / (0.2 * steps))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained for {steps} steps: loss {loss.item():.3f}", file=sys.stderr)
    return Subject(model.eval(), batches[-1], classify(model))


# Methods
# ---------------------------------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """Independent estimates of the traces of one or of all blocks, and the seconds they took."""

    traces: dict[Block, float]
    seconds: float


class Method(NamedTuple):
    """One way of estimating traces.

    Args:
        draw: seed -> trace by block.
        gauss_newton: whether it estimates the Gauss-Newton matrix; otherwise the Hessian.
        own: whether it is this package's.
    """

    draw: Callable[[int], dict[Block, float]]
    gauss_newton: bool
    own: bool

    def timed(self, seed: int) -> Draw:
        begin = time.perf_counter()
        if self.own:
            traces = self.draw(seed)
        else:
            with sdpa_kernel(SDPBackend.MATH):  # they need an attention kernel that has every derivative
                traces = self.draw(seed)
        return Draw(traces, time.perf_counter() - begin)


def ours(subject: Subject) -> dict[str, Method]:
    """This package's: all blocks at once."""

    def method(estimator: str, **settings: Any) -> Method:
        def draw(seed: int) -> dict[Block, float]:
            report = measure_sharpness(
                subject.model,
                subject.batch,
                estimator=estimator,
                seed=seed,
                blocks=subject.blocks,
                **settings,
            )
            return {block: report[block].mean * report[block].numel for block in subject.present}

        return Method(draw, gauss_newton=estimator == "fisher", own=True)

    return {
        "fisher": method("fisher"),
        "hutchinson": method("hutchinson", hvp="double-backward"),
        "hutchinson, differences": method("hutchinson", hvp="finite-differences"),
    }


def theirs(subject: Subject, block: Block, *, slow: bool) -> dict[str, Method]:
    """Other libraries': one block.

    Args:
        subject: what is measured.
        block: the block.
        slow: the ones that take several products a draw, too.
    """
    found = {
        "curvlinops GGN hutchinson": _curvlinops(subject, block, "GGN", curvlinops.hutchinson_trace, 1),
        "curvlinops Hessian hutchinson": _curvlinops(
            subject, block, "Hessian", curvlinops.hutchinson_trace, 1
        ),
        "eigenthings GGN hutchinson": _eigenthings(subject, block, "GGN", "hutchinson", 1),
        "eigenthings Hessian hutchinson": _eigenthings(subject, block, "Hessian", "hutchinson", 1),
    }
    if slow:
        found |= {
            "curvlinops GGN hutch++": _curvlinops(subject, block, "GGN", curvlinops.hutchpp_trace, MATVECS),
            "curvlinops GGN xtrace": _curvlinops(subject, block, "GGN", curvlinops.xtrace, MATVECS),
            "eigenthings GGN hutch++": _eigenthings(subject, block, "GGN", "hutch++", MATVECS),
        }
    return found


class _Rows(nn.Module):
    """Token ids to one row of logits a predicted token: what curvlinops calls a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits[:, :-1].flatten(0, 1)


def _curvlinops(subject: Subject, block: Block, matrix: str, trace: Any, matvecs: int) -> Method:
    parameters = dict(subject.model.named_parameters())
    operator = getattr(curvlinops, f"{matrix}LinearOperator")(
        _Rows(subject.model),
        nn.CrossEntropyLoss(),
        [parameters[name] for name in subject.names(block)],
        [(subject.ids, subject.ids[:, 1:].flatten())],
        check_deterministic=False,
    )

    def draw(seed: int) -> dict[Block, float]:
        torch.manual_seed(seed)
        return {block: float(trace(operator, num_matvecs=matvecs))}

    return Method(draw, gauss_newton=matrix == "GGN", own=False)


def _eigenthings(subject: Subject, block: Block, matrix: str, method: Any, matvecs: int) -> Method:
    lib, chosen = hessian_eigenthings, set(subject.names(block))
    functions = [lib.hf_lm_forward(), lib.hf_lm_loss_of_output()] if matrix == "GGN" else [lib.hf_lm_loss()]
    operator = getattr(lib, f"{matrix}Operator")(
        subject.model, [subject.batch], *functions, param_filter=lambda name, _: name in chosen
    )

    def draw(seed: int) -> dict[Block, float]:
        return {block: lib.trace(operator, num_matvecs=matvecs, method=method, seed=seed).estimate}

    return Method(draw, gauss_newton=matrix == "GGN", own=False)
