"""Heads as Adam-mini cuts them are those that attention sees: asked of autograd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from blockwise_lr.blocks import Block, BlockMap, classify, split_fused
from support.architectures import CAUSAL
from support.by_function import functions_watched
from support.proofs import UNBUILDABLE, inputs_for, varied


def partitions(blocks: BlockMap) -> dict[str, tuple[int, ...] | None]:
    return {name: blocks.assignment(name).structure.partition for name in blocks}


pytestmark = pytest.mark.filterwarnings("ignore")

QUICK = ("llama", "qwen3", "gpt2", "gpt_neox", "gemma2", "deepseek_v3", "phi3", "gemma3_text", "gpt_oss")
# Here something that is done to all heads together makes each depend on all: a norm, or a convolution.
MIXED = (
    *(
        "bailing_hybrid",
        "flex_olmo",
        "kimi_linear",
        "minimax_m2",
        "olmo2",
        "olmo3",
        "olmo_hybrid",
        "olmoe",
        "zaya",
    ),
    *(
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "qwen4_exp",
        "qwen4_exp_text",
    ),
)


def first_attention(model: nn.Module, model_type: str) -> tuple[Tensor, Tensor] | None:
    """Queries and keys (batch, heads, length, size) of the first attention that ran; None if it has other shapes."""
    seen: list[tuple[Tensor, Tensor]] = []

    def record(scores: list[Tensor], values: list[Tensor]) -> None:
        if all(tensor.ndim == 4 and tensor.requires_grad for tensor in scores):
            seen.append((scores[0], scores[1]))

    with functions_watched(model, record):
        model(**inputs_for(model, None))
    return seen[0] if seen else None


def wrong_pieces(model: nn.Module, heads: Tensor) -> Iterator[str]:
    """Matrices by head of which one of these heads is not moved by exactly one piece."""
    cut, parameters = partitions(classify(model)), dict(model.named_parameters())
    blocks = classify(model)
    by_head = {
        name: (dim, pieces)
        for name, partition in cut.items()
        if blocks[name] is Block.QK and parameters[name].ndim == 2
        for dim, pieces in enumerate(partition or ())
        if 1 < pieces < parameters[name].shape[dim]
    }
    for head in range(heads.shape[1]):
        weighted = (heads[:, head] * torch.randn_like(heads[:, head])).sum()
        found = torch.autograd.grad(
            weighted, [parameters[name] for name in by_head], retain_graph=True, allow_unused=True
        )
        for (name, (dim, pieces)), gradient in zip(by_head.items(), found):
            if (
                gradient is None or not gradient.any()
            ):  # of a part of a fused weight that makes something else
                continue
            moved = (gradient != 0).any(1 - dim).view(pieces, -1)
            if moved.any(1).sum() != 1 or not moved[moved.any(1)].all():
                yield f"{name}, head {head}: {moved.any(1).sum()} of {pieces} pieces"


def check(model_type: str) -> int:
    """How many tensors of heads were looked at."""
    model = split_fused(varied(model_type))
    seen = first_attention(model, model_type)
    if seen is None:
        return 0
    assert [problem for heads in seen for problem in wrong_pieces(model, heads)] == []
    return 2


@pytest.mark.parametrize("model_type", QUICK)
def test_each_head_is_moved_by_one_piece(model_type: str) -> None:
    assert check(model_type) == 2


@pytest.mark.slow
def test_each_head_of_every_causal_model_is_moved_by_one_piece() -> None:
    others = [name for name in CAUSAL if name not in UNBUILDABLE and name not in MIXED]
    assert sum(check(model_type) > 0 for model_type in others) >= 140


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MIXED)
def test_the_exceptions_are_still_needed(model_type: str) -> None:
    with pytest.raises(AssertionError):
        check(model_type)


def test_a_cut_in_the_wrong_place_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = varied("llama")
    seen = first_attention(model, "llama")
    assert seen is not None
    right = partitions(classify(model))
    wrong = {name: (2, 1) if "q_proj.weight" in name else cut for name, cut in right.items()}  # of four heads
    monkeypatch.setitem(globals(), "partitions", lambda *_: wrong)
    assert len(list(wrong_pieces(model, seen[0]))) == 4


def test_what_has_no_known_heads_is_none_and_never_an_error() -> None:
    class CausalSelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)
            self.v_proj, self.o_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    model = CausalSelfAttention()
    cut = partitions(classify(model))
    assert cut["q_proj.weight"] is None
    assert cut["k_proj.weight"] is None
    assert cut["v_proj.weight"] == (8, 1)
    assert cut["q_proj.bias"] == (8,)
