"""Where the mathematics did not change, the numbers do not either."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2LMHeadModel

from blockwise_lr import cosine_schedule, param_groups, split_fused
from support import tiny_models

VOCAB, CONTEXT, WIDTH, HEADS, LAYERS = 61, 12, 16, 2, 2
LR, FLOOR, WARMUP = 1e-3, 5e-5, 10


llama = partial(
    tiny_models.llama,
    vocab_size=VOCAB,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
)


gpt2 = partial(tiny_models.gpt2, vocab_size=VOCAB, n_embd=WIDTH, dropout=0.0)


def batches(n):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (4, CONTEXT), generator=generator) for _ in range(n)]


def train(
    model, optimizer, schedule, n, clip=None, loss_of=lambda model, ids: model(input_ids=ids, labels=ids).loss
):
    losses = []
    for ids in batches(n):
        loss = loss_of(model, ids)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def literal_schedule(optimizer, total):
    """The same learning rates by torch's LambdaLR, from the paper's formula (arXiv 2502.19002)."""

    def factor(t):
        if t < WARMUP:
            return (t + 1) / WARMUP
        c = (1 + math.cos(math.pi * ((t - WARMUP) / (total - WARMUP)))) / 2
        return (FLOOR + (LR - FLOOR) * c) / LR

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def plain_and_blockwise_losses(make_model, clip=None, steps=200):
    plain = make_model()
    ours = split_fused(make_model())
    options = {"lr": LR, "betas": (0.9, 0.95), "weight_decay": 0.1, "foreach": False}
    plain_optimizer = torch.optim.AdamW(plain.parameters(), **options)
    optimizer = torch.optim.AdamW(param_groups(ours, LR, ratios={}, weight_decay=0.1), **options)

    # One learning rate for both, set from one function: the schedules are compared elsewhere, here every bit counts.
    ours_schedule = cosine_schedule(optimizer, warmup_steps=WARMUP, total_steps=steps, floor=FLOOR)
    plain_schedule = cosine_schedule(plain_optimizer, warmup_steps=WARMUP, total_steps=steps, floor=FLOOR)
    plain_losses = train(plain, plain_optimizer, plain_schedule, steps, clip)
    our_losses = train(ours, optimizer, ours_schedule, steps, clip)
    return plain, ours, plain_losses, our_losses


@pytest.mark.parametrize("make_model", [llama, gpt2])
def test_ratio_of_one_is_plain_adamw_to_the_bit(make_model):
    plain, ours, plain_losses, our_losses = plain_and_blockwise_losses(make_model)
    assert our_losses == plain_losses
    assert our_losses[-1] < our_losses[0]
    theirs, mine = plain.state_dict(), ours.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_with_clipping_the_norm_sums_in_another_order_and_the_loss_agrees_to_1e_4():
    # 200 steps amplify differences of the last bit; LLaMA has nothing to split and stays equal.
    _, _, plain_losses, our_losses = plain_and_blockwise_losses(gpt2, clip=0.5)
    assert our_losses == pytest.approx(plain_losses, abs=1e-4)


def test_our_schedule_with_ratio_one_agrees_with_torchs_lambda_schedule():
    steps = 50
    optimizers = [torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=LR) for _ in range(2)]
    ours = cosine_schedule(optimizers[0], warmup_steps=WARMUP, total_steps=steps, floor=FLOOR)
    torchs = literal_schedule(optimizers[1], steps)
    for _ in range(steps):
        assert ours.get_last_lr() == pytest.approx(torchs.get_last_lr(), rel=1e-12)
        for each in (*optimizers, ours, torchs):
            each.step()


class SeparateAttention(nn.Module):
    """Causal self-attention with queries, keys and values as Linears of their own."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        weights = fused.c_attn.weight.detach().T.chunk(3)  # Conv1D keeps (in, out)
        biases = fused.c_attn.bias.detach().chunk(3)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, dtype=weights[0].dtype) for _ in range(4))
        values = [
            *zip((self.q, self.k, self.v), weights, biases),
            (self.o, fused.c_proj.weight.T, fused.c_proj.bias),
        ]
        with torch.no_grad():
            for linear, weight, bias in values:
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class HandWrittenGPT2(nn.Module):
    """GPT-2 with separate query, key and value projections, by hand, with a transformers GPT-2's weights."""

    def __init__(self, source: GPT2LMHeadModel) -> None:
        super().__init__()
        self.body = copy.deepcopy(source.transformer)
        for layer in self.body.h:
            layer.attn = SeparateAttention(layer.attn)

    def forward(self, ids):
        x = self.body.wte(ids) + self.body.wpe(torch.arange(ids.shape[1]))
        for layer in self.body.h:
            x = x + layer.attn(layer.ln_1(x))
            x = x + layer.mlp(layer.ln_2(x))
        return self.body.ln_f(x) @ self.body.wte.weight.T


def next_token_loss(model, ids):
    """In float64: transformers' own loss rounds the logits to float32."""
    out = model(ids)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_a_split_gpt2_equals_a_hand_written_one_with_separate_projections_and_hand_made_groups():
    lr, steps = 1e-4, 100
    source = gpt2().double()
    by_hand = HandWrittenGPT2(source)
    split = split_fused(source)

    body = by_hand.body
    attention, mlps = [layer.attn for layer in body.h], [layer.mlp for layer in body.h]
    norms = [body.ln_f, *(n for layer in body.h for n in (layer.ln_1, layer.ln_2))]
    hand_groups = [
        (1, [p for n in norms for p in n.parameters()]),
        (10, [body.wte.weight]),
        (8, [p for a in attention for linear in (a.q, a.k) for p in linear.parameters()]),
        (4, [p for a in attention for linear in (a.v, a.o) for p in linear.parameters()]),
        (6, [p for m in mlps for p in m.parameters()]),
        (1, [body.wpe.weight]),
    ]
    options = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.1}
    hand_optimizer = torch.optim.AdamW(
        [{"params": p, "lr": r * lr, "lr_ratio": r} for r, p in hand_groups], **options
    )
    optimizer = torch.optim.AdamW(param_groups(split, lr, "paper", weight_decay=0.1), **options)
    schedules = [
        cosine_schedule(o, warmup_steps=5, total_steps=steps, floor=lr / 20)
        for o in (hand_optimizer, optimizer)
    ]

    hand_losses = train(by_hand, hand_optimizer, schedules[0], steps, loss_of=next_token_loss)
    our_losses = train(split, optimizer, schedules[1], steps, loss_of=next_token_loss)
    assert our_losses == pytest.approx(hand_losses, abs=1e-10)
    assert our_losses[-1] < our_losses[0]

    merged = split.state_dict()
    for i, attn in enumerate(attention):
        weights = merged[f"transformer.h.{i}.attn.c_attn.weight"].T.chunk(3)
        biases = merged[f"transformer.h.{i}.attn.c_attn.bias"].chunk(3)
        for part, weight, bias in zip((attn.q, attn.k, attn.v), weights, biases):
            torch.testing.assert_close(weight, part.weight.detach(), rtol=0, atol=1e-9)
            if part is not attn.k:  # a key's bias has no true gradient: Adam normalises rounding noise there
                torch.testing.assert_close(bias, part.bias.detach(), rtol=0, atol=1e-9)
