"""Models written by hand after nanoGPT and torchtitan: tiny, and nothing taken from there."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu

from support.case import CONTEXT, VOCAB, WIDTH


class NanoAttention(nn.Module):
    """Causal self-attention with one Linear for q, k, v, as in nanoGPT."""

    def __init__(
        self, width: int = WIDTH, heads: int = 2, kv_heads: int | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.n_head, self.n_kv_head = heads, kv_heads or heads
        self.kv_width = width // heads * self.n_kv_head
        self.c_attn = nn.Linear(width, width + 2 * self.kv_width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.c_attn(x).split([width, self.kv_width, self.kv_width], dim=2)
        q, k, v = (t.view(batch, length, -1, width // self.n_head).transpose(1, 2) for t in (q, k, v))
        group = self.n_head // self.n_kv_head
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(k.shape[-1])
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class NanoNorm(nn.Module):
    """A LayerNorm with an optional bias, whose class name says nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight.shape, self.weight, self.bias)


class NanoMLP(nn.Module):
    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(gelu(self.c_fc(x)))


class NanoBlock(nn.Module):
    def __init__(self, width: int, kv_heads: int | None, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.attn = NanoNorm(width), NanoAttention(width, kv_heads=kv_heads, bias=bias)
        self.ln_2, self.mlp = NanoNorm(width), NanoMLP(width, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """nanoGPT's layout: a ModuleDict, and a head that shares the token embedding's weight."""

    def __init__(
        self, layers: int = 1, kv_heads: int | None = None, bias: bool = True, tied: bool = True
    ) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, WIDTH),
                "wpe": nn.Embedding(CONTEXT, WIDTH),
                "h": nn.ModuleList([NanoBlock(WIDTH, kv_heads, bias) for _ in range(layers)]),
                "ln_f": NanoNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.transformer.wte.weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])
        x = self.transformer.wte(tokens) + self.transformer.wpe(positions)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


class TitanAttention(nn.Module):
    """Grouped-query attention with wq, wk, wv, wo, as in torchtitan and the LLaMA reference code."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.wv, self.wo = nn.Linear(WIDTH, WIDTH // 2, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.wq, self.wk, self.wv))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class TitanFeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(WIDTH, 20, bias=False), nn.Linear(20, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(silu(self.w1(x)) * self.w3(x))


class TitanBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = TitanAttention(), TitanFeedForward()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class TitanLlama(nn.Module):
    """torchtitan's layout: layers in a ModuleDict, an untied head called `output`."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleDict({"0": TitanBlock()})
        self.norm, self.output = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x)
        return self.output(self.norm(x))
