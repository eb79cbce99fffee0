"""Models as people write them by hand, after timm, nanochat, LitGPT and Hyena: tiny, and nothing taken from there."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.fft import irfft, rfft
from torch.nn.functional import gelu, relu, rms_norm, scaled_dot_product_attention, silu

from support.case import VOCAB, WIDTH

HEADS = 2


def heads_of(x: Tensor) -> Tensor:
    """(batch, length, heads * size) -> (batch, heads, length, size)."""
    return x.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    mixed = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return mixed.transpose(1, 2).flatten(2)


# timm's VisionTransformer --------------------------------------------------------------------


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(0.1 * torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, kernel_size=4, stride=4)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(t) for t in self.qkv(x).chunk(3, dim=-1))
        return self.proj(attend(self.q_norm(q), self.k_norm(k), v, causal=False))


class VisionMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(WIDTH), VisionAttention(), LayerScale()
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(WIDTH), VisionMlp(), LayerScale()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """A class token, learned positions, fused qkv with norms of queries and keys, layer scale, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.blocks = nn.Sequential(VisionBlock())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        return self.head(self.norm(self.blocks(x + self.pos_embed))[:, 0])


# nanochat's GPT --------------------------------------------------------------------------


class ChatAttention(nn.Module):
    """Norms without parameters; values mixed with an embedding of the tokens by a small gate."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head, self.n_kv_head = HEADS, 1
        self.c_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.c_k = nn.Linear(WIDTH, WIDTH // HEADS, bias=False)
        self.c_v = nn.Linear(WIDTH, WIDTH // HEADS, bias=False)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.ve_gate = nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor, value_embedding: Tensor) -> Tensor:
        q, k = (rms_norm(heads_of(layer(x)), (WIDTH // HEADS,)) for layer in (self.c_q, self.c_k))
        gate = 2 * self.ve_gate(x[..., :3]).sigmoid()
        return self.c_proj(attend(q, k, heads_of(self.c_v(x) + gate * value_embedding)))


class ChatMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.c_proj = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(relu(self.c_fc(x)).square())


class ChatBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = ChatAttention(), ChatMLP()

    def forward(self, x: Tensor, value_embedding: Tensor) -> Tensor:
        x = x + self.attn(rms_norm(x, (WIDTH,)), value_embedding)
        return x + self.mlp(rms_norm(x, (WIDTH,)))


class ChatGPT(nn.Module):
    """An untied head, value embeddings as long as the vocabulary, scalars that scale the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.ModuleList([ChatBlock()])
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(VOCAB, WIDTH), "h": layers})
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.value_embeds = nn.ModuleDict({"0": nn.Embedding(VOCAB, WIDTH // HEADS)})
        self.smear_gate, self.smear_lambda = nn.Linear(3, 1, bias=False), nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = rms_norm(self.transformer.wte(tokens), (WIDTH,))
        gate = self.smear_lambda * self.smear_gate(x[:, 1:, :3]).sigmoid()
        x = x0 = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)
        for i, block in enumerate(self.transformer.h):
            x = block(self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0, self.value_embeds[str(i)](tokens))
        return self.lm_head(rms_norm(x, (WIDTH,)))


# LitGPT's GPT ----------------------------------------------------------------------------


class LitAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 2 * WIDTH, bias=False)  # two heads of queries, one of keys and of values
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([WIDTH, WIDTH // HEADS, WIDTH // HEADS], dim=-1)
        return self.proj(attend(heads_of(q), heads_of(k), heads_of(v)))


class CausalSelfAttention(nn.Module):
    """As it was before: group by group, the queries of the group, their key and their value."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_head=4, n_query_groups=2)
        self.attn = nn.Linear(WIDTH, 2 * WIDTH)  # four heads of two queries each, two of keys and of values
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        by_group = self.attn(x).unflatten(-1, (2, 4, 2)).permute(0, 2, 3, 1, 4)
        q, k, v = by_group.split([2, 1, 1], dim=2)
        return self.proj(attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)))


class LitMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc_1, self.fc_2 = nn.Linear(WIDTH, 20, bias=False), nn.Linear(WIDTH, 20, bias=False)
        self.proj = nn.Linear(20, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(silu(self.fc_1(x)) * self.fc_2(x))


class LitBlock(nn.Module):
    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.norm_1, self.attn = nn.RMSNorm(WIDTH), attention()
        self.norm_2, self.mlp = nn.RMSNorm(WIDTH), LitMLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class LitGPT(nn.Module):
    """The head is made first; grouped queries in one weight; `proj` both in the attention and in the MLP."""

    def __init__(self, attention: type[nn.Module] = LitAttention) -> None:
        super().__init__()
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, WIDTH),
                "h": nn.ModuleList([LitBlock(attention)]),
                "ln_f": nn.RMSNorm(WIDTH),
            }
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer.wte(tokens)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


# Hyena -----------------------------------------------------------------------------------


class Sine(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.freq = nn.Parameter(10 * torch.ones(1, width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.freq * x).sin()


class HyenaFilter(nn.Module):
    """A long convolution whose filter is a small network of the position."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.implicit_filter = nn.Sequential(nn.Linear(3, 6), Sine(6), nn.Linear(6, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-1]
        positions = torch.linspace(0, 1, length)
        features = torch.stack([positions, positions.cos(), positions.sin()], dim=-1)
        kernel = self.implicit_filter(features).T
        mixed = irfft(rfft(x, 2 * length) * rfft(kernel, 2 * length), 2 * length)[..., :length]
        return mixed + x * self.bias[:, None]


class HyenaOperator(nn.Module):
    """No queries or keys that are compared: what is projected is gated and convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.short_filter = nn.Conv1d(3 * WIDTH, 3 * WIDTH, 3, padding=2, groups=3 * WIDTH)
        self.filter_fn = HyenaFilter()

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.short_filter(self.in_proj(x).transpose(1, 2))[..., : x.shape[1]]
        gate, other, value = mixed.chunk(3, dim=1)
        return self.out_proj((gate * self.filter_fn(other * value)).transpose(1, 2))


class HyenaBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(WIDTH), HyenaOperator()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), VisionMlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class HyenaLM(nn.Module):
    """A head that shares the embedding's weight; no attention anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(VOCAB, WIDTH), nn.ModuleList([HyenaBlock()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))
