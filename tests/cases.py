"""Tiny models with the block of every parameter written out by hand.

A case says what `classify` must answer, and what it must answer after `split_fused`. To add an architecture,
add a case here and, if it needs one, a line in `blocks/rules.py` or `blocks/attention.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu

VOCAB, CONTEXT, WIDTH = 40, 12, 8


@dataclass(frozen=True)
class Case:
    """One model.

    Args:
        name: what it is called in a test's id.
        build: makes the model, seeded.
        blocks: name of every trainable parameter -> its block's value, before splitting, in order.
        split: name of every parameter that split_fused replaces -> blocks of its parts.
        run: the model's output for seeded inputs; None: token ids in, `.logits` or a tensor out.
    """

    name: str
    build: Callable[[], nn.Module]
    blocks: dict[str, str]
    split: dict[str, list[str]] = field(default_factory=dict)
    run: Callable[[nn.Module], Tensor] | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()

    def output(self, model: nn.Module) -> Tensor:
        """The model's output for inputs that are always the same."""
        torch.manual_seed(1)
        if self.run is not None:
            return self.run(model)
        out = model(torch.randint(VOCAB, (2, CONTEXT - 1)))
        return out if isinstance(out, Tensor) else out.logits

    def split_blocks(self) -> dict[str, str]:
        """The blocks of the split model's parameters."""
        found = {name: block for name, block in self.blocks.items() if name not in self.split}
        for name, parts in self.split.items():
            path, _, leaf = name.rpartition(".")
            prefix = f"{path}.parametrizations.{leaf}" if path else f"parametrizations.{leaf}"
            found |= {f"{prefix}.original{i}": block for i, block in enumerate(parts)}
        return found


# Models ---------------------------------------------------------------------------------


def gpt2(**settings: object) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": WIDTH, "n_head": 2, "n_layer": 1, "vocab_size": VOCAB, "n_positions": CONTEXT}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **special, **settings})).eval()


def llama(**settings: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": VOCAB}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "intermediate_size": 20, **settings})).eval()


def phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 20,
    }
    return Phi3ForCausalLM(Phi3Config(num_hidden_layers=1, vocab_size=VOCAB, pad_token_id=0, **sizes)).eval()


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 20,
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, vocab_size=VOCAB, **sizes, **experts)).eval()


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


def _run_encoder(model: nn.Module) -> Tensor:
    return model(torch.randn(2, 5, WIDTH))


def _run_decoder(model: nn.Module) -> Tensor:
    return model(torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH))


def _run_attention(model: nn.Module) -> Tensor:
    q, k, v = torch.randn(2, 5, WIDTH), torch.randn(2, 7, 6), torch.randn(2, 7, 10)
    return model(q, k, v)[0]


# Blocks ---------------------------------------------------------------------------------

QKV_PARTS = ["qk", "qk", "vo"]

_NORM_PAIR = {"weight": "norm", "bias": "norm"}


def _prefixed(prefix: str, blocks: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}.{name}": block for name, block in blocks.items()}


_GPT2_LAYER = {
    "ln_1.weight": "norm",
    "ln_1.bias": "norm",
    "attn.c_attn.weight": "qkv",
    "attn.c_attn.bias": "qkv",
    "attn.c_proj.weight": "vo",
    "attn.c_proj.bias": "vo",
    "ln_2.weight": "norm",
    "ln_2.bias": "norm",
    "mlp.c_fc.weight": "ffn",
    "mlp.c_fc.bias": "ffn",
    "mlp.c_proj.weight": "ffn",
    "mlp.c_proj.bias": "ffn",
}
_GPT2 = {
    "transformer.wte.weight": "emb",
    "transformer.wpe.weight": "pos",
    **_prefixed("transformer.h.0", _GPT2_LAYER),
    "transformer.ln_f.weight": "norm",
    "transformer.ln_f.bias": "norm",
}
_GPT2_SPLIT = {f"transformer.h.0.attn.c_attn.{leaf}": QKV_PARTS for leaf in ("weight", "bias")}
_GPT2_CROSS_LAYER = {
    "crossattention.c_attn.weight": "qkv",
    "crossattention.c_attn.bias": "qkv",
    "crossattention.q_attn.weight": "qk",
    "crossattention.q_attn.bias": "qk",
    "crossattention.c_proj.weight": "vo",
    "crossattention.c_proj.bias": "vo",
    "ln_cross_attn.weight": "norm",
    "ln_cross_attn.bias": "norm",
}

_LLAMA_ATTENTION = {
    "self_attn.q_proj.weight": "qk",
    "self_attn.k_proj.weight": "qk",
    "self_attn.v_proj.weight": "vo",
    "self_attn.o_proj.weight": "vo",
}
_LLAMA_NORMS = {"input_layernorm.weight": "norm", "post_attention_layernorm.weight": "norm"}
_LLAMA_TIED = {
    "model.embed_tokens.weight": "emb",
    **_prefixed(
        "model.layers.0",
        {
            **_LLAMA_ATTENTION,
            "mlp.gate_proj.weight": "ffn",
            "mlp.up_proj.weight": "ffn",
            "mlp.down_proj.weight": "ffn",
            **_LLAMA_NORMS,
        },
    ),
    "model.norm.weight": "norm",
}

_TORCH_ATTENTION = {
    "in_proj_weight": "qkv",
    "in_proj_bias": "qkv",
    "out_proj.weight": "vo",
    "out_proj.bias": "vo",
}
_TORCH_FEED_FORWARD = {
    "linear1.weight": "ffn",
    "linear1.bias": "ffn",
    "linear2.weight": "ffn",
    "linear2.bias": "ffn",
}

_NANO = {
    "transformer.wte.weight": "emb",
    "transformer.wpe.weight": "pos",
    **_prefixed(
        "transformer.h.0", {k: b for k, b in _GPT2_LAYER.items() if not k.startswith("ln") or "weight" in k}
    ),
    "transformer.ln_f.weight": "norm",
}

CASES: tuple[Case, ...] = (
    Case("gpt2", gpt2, _GPT2, _GPT2_SPLIT),
    Case(
        "gpt2-untied",
        lambda: gpt2(tie_word_embeddings=False),
        {**_GPT2, "lm_head.weight": "head"},
        _GPT2_SPLIT,
    ),
    Case(
        "gpt2-cross-attention",
        lambda: gpt2(add_cross_attention=True),
        {**_GPT2, **_prefixed("transformer.h.0", _GPT2_CROSS_LAYER)},
        {
            **_GPT2_SPLIT,
            "transformer.h.0.crossattention.c_attn.weight": ["qk", "vo"],
            "transformer.h.0.crossattention.c_attn.bias": ["qk", "vo"],
        },
        lambda model: model(torch.arange(4)[None], encoder_hidden_states=torch.randn(1, 3, WIDTH)).logits,
    ),
    Case("llama", llama, {**_LLAMA_TIED, "lm_head.weight": "head"}),
    Case("llama-tied-gqa", lambda: llama(tie_word_embeddings=True, num_key_value_heads=2), _LLAMA_TIED),
    Case(
        "phi3-gqa",
        phi3,
        {
            "model.embed_tokens.weight": "emb",
            **_prefixed(
                "model.layers.0",
                {
                    "self_attn.o_proj.weight": "vo",
                    "self_attn.qkv_proj.weight": "qkv",
                    "mlp.gate_up_proj.weight": "ffn",
                    "mlp.down_proj.weight": "ffn",
                    **_LLAMA_NORMS,
                },
            ),
            "model.norm.weight": "norm",
            "lm_head.weight": "head",
        },
        {"model.layers.0.self_attn.qkv_proj.weight": QKV_PARTS},
    ),
    Case(
        "mixtral",
        mixtral,
        {
            "model.embed_tokens.weight": "emb",
            **_prefixed(
                "model.layers.0",
                {
                    **_LLAMA_ATTENTION,
                    "mlp.gate.weight": "router",
                    "mlp.experts.gate_up_proj": "ffn",
                    "mlp.experts.down_proj": "ffn",
                    **_LLAMA_NORMS,
                },
            ),
            "model.norm.weight": "norm",
            "lm_head.weight": "head",
        },
    ),
    Case(
        "torch-encoder-layer",
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, 20, batch_first=True, dropout=0.0),
        {
            **_prefixed("self_attn", _TORCH_ATTENTION),
            **_TORCH_FEED_FORWARD,
            **_prefixed("norm1", _NORM_PAIR),
            **_prefixed("norm2", _NORM_PAIR),
        },
        {"self_attn.in_proj_weight": QKV_PARTS, "self_attn.in_proj_bias": QKV_PARTS},
        _run_encoder,
    ),
    Case(
        "torch-decoder",
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 20, 0.0, batch_first=True), 1),
        _prefixed(
            "layers.0",
            {
                **_prefixed("self_attn", _TORCH_ATTENTION),
                **_prefixed("multihead_attn", _TORCH_ATTENTION),
                **_TORCH_FEED_FORWARD,
                **_prefixed("norm1", _NORM_PAIR),
                **_prefixed("norm2", _NORM_PAIR),
                **_prefixed("norm3", _NORM_PAIR),
            },
        ),
        {
            f"layers.0.{attention}.{leaf}": QKV_PARTS
            for attention in ("self_attn", "multihead_attn")
            for leaf in ("in_proj_weight", "in_proj_bias")
        },
        _run_decoder,
    ),
    Case(
        "torch-attention-of-three-widths",
        lambda: nn.MultiheadAttention(WIDTH, 2, kdim=6, vdim=10, add_bias_kv=True, batch_first=True),
        {
            "q_proj_weight": "qk",
            "k_proj_weight": "qk",
            "v_proj_weight": "vo",
            "in_proj_bias": "qkv",
            "bias_k": "qk",
            "bias_v": "vo",
            "out_proj.weight": "vo",
            "out_proj.bias": "vo",
        },
        {"in_proj_bias": QKV_PARTS},
        _run_attention,
    ),
    Case(
        "nanogpt",
        NanoGPT,
        _NANO,
        {f"transformer.h.0.attn.c_attn.{leaf}": QKV_PARTS for leaf in ("weight", "bias")},
    ),
    Case(
        "nanogpt-gqa-without-biases",
        lambda: NanoGPT(kv_heads=1, bias=False, tied=False),
        {**{name: block for name, block in _NANO.items() if "bias" not in name}, "lm_head.weight": "head"},
        {"transformer.h.0.attn.c_attn.weight": QKV_PARTS},
    ),
    Case(
        "torchtitan-llama",
        TitanLlama,
        {
            "tok_embeddings.weight": "emb",
            **_prefixed(
                "layers.0",
                {
                    "attention.wq.weight": "qk",
                    "attention.wk.weight": "qk",
                    "attention.wv.weight": "vo",
                    "attention.wo.weight": "vo",
                    "feed_forward.w1.weight": "ffn",
                    "feed_forward.w2.weight": "ffn",
                    "feed_forward.w3.weight": "ffn",
                    "attention_norm.weight": "norm",
                    "ffn_norm.weight": "norm",
                },
            ),
            "norm.weight": "norm",
            "output.weight": "head",
        },
    ),
)

FUSED_CASES = tuple(case for case in CASES if case.split)
