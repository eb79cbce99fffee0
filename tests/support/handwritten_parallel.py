"""Models as people write them by hand, after Megatron-LM and modded-nanogpt: tiny, and nothing taken from there."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, relu, rms_norm

from support.case import VOCAB, WIDTH
from support.handwritten import HEADS, attend, heads_of

# Megatron-LM's GPT --------------------------------------------------------------------------


class VocabParallelEmbedding(nn.Module):
    """No nn.Embedding: it has the rows of this process only."""

    def __init__(self) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = VOCAB, WIDTH
        self.weight = nn.Parameter(torch.randn(VOCAB, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.weight)


class ColumnParallelLinear(nn.Module):
    """No nn.Linear: its outputs are cut among processes."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.input_size, self.output_size, self.output_size_per_partition = (
            input_size,
            output_size,
            output_size,
        )
        self.weight = nn.Parameter(torch.randn(output_size, input_size) / input_size**0.5)
        self.bias = nn.Parameter(torch.zeros(output_size))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RowParallelLinear(ColumnParallelLinear):
    pass


class SelfAttention(nn.Module):
    """Fused by group: the queries of the group, its key, its value."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=4, num_query_groups=2)
        self.linear_proj = RowParallelLinear(WIDTH, WIDTH)
        self.linear_qkv = ColumnParallelLinear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        by_group = self.linear_qkv(x).unflatten(-1, (2, 4, 2)).permute(0, 2, 3, 1, 4)
        q, k, v = by_group.split([2, 1, 1], dim=2)
        return self.linear_proj(attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)))


class ParallelMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = ColumnParallelLinear(WIDTH, 20), RowParallelLinear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(gelu(self.linear_fc1(x)))


class TransformerLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.self_attention = nn.LayerNorm(WIDTH), SelfAttention()
        self.pre_mlp_layernorm, self.mlp = nn.LayerNorm(WIDTH), ParallelMLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.pre_mlp_layernorm(x))


class MegatronGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.ModuleDict(
            {"word_embeddings": VocabParallelEmbedding(), "position_embeddings": nn.Embedding(12, WIDTH)}
        )
        self.decoder = nn.ModuleDict(
            {"layers": nn.ModuleList([TransformerLayer()]), "final_layernorm": nn.LayerNorm(WIDTH)}
        )
        self.output_layer = ColumnParallelLinear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.embedding["position_embeddings"].weight[: tokens.shape[1]]
        x = self.embedding["word_embeddings"](tokens) + positions
        for layer in self.decoder["layers"]:
            x = layer(x)
        return self.output_layer(self.decoder["final_layernorm"](x))


# modded-nanogpt's GPT -------------------------------------------------------------------------


class CastedLinear(nn.Linear):
    """Weights in another precision than the activations."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.type_as(x))


class StackedAttention(nn.Module):
    """Queries, keys and values in one parameter of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv_w = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / WIDTH**0.5)
        self.lambdas = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.c_proj = CastedLinear(WIDTH, WIDTH)

    def forward(self, x: Tensor, value_embedding: Tensor) -> Tensor:
        q, k, v = linear(x, self.qkv_w.flatten(end_dim=1)).chunk(3, dim=-1)
        q, k = (rms_norm(heads_of(t), (WIDTH // HEADS,)) for t in (q, k))
        v = self.lambdas[0] * v + self.lambdas[1] * value_embedding
        return self.c_proj(attend(q, k, heads_of(v)))


class MergedAttention(nn.Module):
    """Later: the output's matrix in there, too, and a gate for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkvo_w = nn.Parameter(torch.randn(4 * WIDTH, WIDTH) / WIDTH**0.5)
        self.attn_gate = CastedLinear(4, HEADS)

    def forward(self, x: Tensor, value_embedding: Tensor) -> Tensor:
        weights = self.qkvo_w.view(4, WIDTH, WIDTH)
        q, k, v = linear(x, weights[:3].flatten(end_dim=1)).chunk(3, dim=-1)
        q, k = (rms_norm(heads_of(t), (WIDTH // HEADS,)) for t in (q, k))
        mixed = attend(q, k, heads_of(v + value_embedding)).unflatten(-1, (HEADS, -1))
        return linear((mixed * self.attn_gate(x[..., :4]).sigmoid()[..., None]).flatten(2), weights[3])


class MLP(nn.Module):
    """Two parameters of the same shape, the second used the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc = nn.Parameter(torch.randn(4 * WIDTH, WIDTH) / WIDTH**0.5)
        self.c_proj = nn.Parameter(torch.randn(4 * WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return linear(relu(linear(x, self.c_fc)).square(), self.c_proj.T)


class Block(nn.Module):
    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.attn, self.mlp, self.lambdas = attention(), MLP(), nn.Parameter(torch.tensor([1.0, 0.1]))

    def forward(self, x: Tensor, value_embedding: Tensor, x0: Tensor) -> Tensor:
        x = self.lambdas[0] * x + self.lambdas[1] * x0
        x = x + self.attn(rms_norm(x, (WIDTH,)), value_embedding)
        return x + self.mlp(rms_norm(x, (WIDTH,)))


class GPT(nn.Module):
    """Embeddings of values, scalars in one parameter, a smear gate, and a head longer than the vocabulary."""

    def __init__(self, attention: type[nn.Module] = MergedAttention) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB - 3, WIDTH)
        self.value_embeds = nn.ModuleList([nn.Embedding(VOCAB - 3, WIDTH)])
        self.smear_gate, self.skip_gate = CastedLinear(4, 1), CastedLinear(4, 1)
        self.blocks = nn.ModuleList([Block(attention)])
        self.lm_head = CastedLinear(WIDTH, VOCAB)
        self.scalars = nn.Parameter(torch.ones(2))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens % (VOCAB - 3)
        x = self.embed(tokens)
        gate = self.scalars[0] * self.smear_gate(x[:, 1:, :4]).sigmoid()
        x = x0 = rms_norm(torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1), (WIDTH,))
        skip = self.scalars[1] * self.skip_gate(x0[..., :4]).sigmoid() * x
        x = self.blocks[0](x, self.value_embeds[0](tokens), x0) + skip
        return self.lm_head(rms_norm(x, (WIDTH,)))
