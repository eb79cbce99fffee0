"""Tiny models in float64, and their curvature in full: slow, literal, and free of the package's estimators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockwise_lr import classify

VOCAB = 7


def gpt2(seed: int = 0, **settings: Any) -> nn.Module:
    """A GPT-2 of 240 parameters with a fused c_attn; its weights are large enough for attention to matter."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 4, "n_head": 2, "n_layer": 1, "n_inner": 8, "vocab_size": VOCAB, "n_positions": 8}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return spread(GPT2LMHeadModel(GPT2Config(**{**sizes, **special, **settings})), seed)


def llama(seed: int = 0, **settings: Any) -> nn.Module:
    """A LLaMA of 520 parameters with an untied head and grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = LlamaConfig(**{**sizes, "intermediate_size": 8, "vocab_size": VOCAB, **settings})
    return spread(LlamaForCausalLM(config), seed)


def spread(model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model in float64 with weights so large that no block's curvature is tiny; always the same ones."""
    generator = torch.Generator().manual_seed(seed)
    model = model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(parameter.mean().round() + 0.4 * noise)  # around 1 in norms, around 0 elsewhere
    return model


def tokens(rows: int = 2, length: int = 5, seed: int = 0, vocab: int = VOCAB) -> dict[str, Tensor]:
    """A batch for a causal language model."""
    ids = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def next_tokens(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A loss_fn: logits of each position and the token after it. transformers' own loss casts them to float32."""
    return model(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]


def gauss_newton_diagonal(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diag of J' (diag(p) - p p') J / B for each parameter, the Jacobian J row by row."""
    names, parameters = zip(*model.named_parameters())
    logits, _ = next_tokens(model, batch)
    logits = logits.flatten(0, 1)
    diagonal = [torch.zeros_like(parameter) for parameter in parameters]
    for row in logits:
        jacobian = [torch.autograd.grad(logit, parameters, retain_graph=True) for logit in row]
        p = row.detach().softmax(-1)
        for i, total in enumerate(diagonal):
            by_class = torch.stack([gradients[i] for gradients in jacobian])
            mean = torch.tensordot(p, by_class, 1)
            total += torch.tensordot(p, by_class.square(), 1) - mean.square()
    return {name: total / len(logits) for name, total in zip(names, diagonal)}


def hessian_diagonal(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diag of the Hessian of the mean cross-entropy, one backward pass an element."""
    names, parameters = zip(*model.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):
        logits, labels = next_tokens(model, batch)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    diagonal = []
    for parameter, gradient in zip(parameters, gradients):
        second = [
            torch.autograd.grad(g, parameter, retain_graph=True)[0].flatten()[i]
            for i, g in enumerate(gradient.flatten())
        ]
        diagonal.append(torch.stack(second).reshape(parameter.shape))
    return dict(zip(names, diagonal))


def by_block(model: nn.Module, diagonal: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of the diagonal over each block. GPT-2's c_attn has its columns in the order q, k, v."""
    blocks, found = classify(model), {}
    for name, values in diagonal.items():
        if "c_attn." in name and "original" not in name:
            q, k, v = values.chunk(3, dim=-1)
            pieces = [("qk", q), ("qk", k), ("vo", v)]
        else:
            pieces = [(blocks[name].value, values)]
        for block, piece in pieces:
            found.setdefault(block, []).append(piece.detach().flatten())
    return {block: float(torch.cat(pieces).mean()) for block, pieces in found.items()}


def means(report: Any) -> dict[str, float]:
    return {block.value: estimate.mean for block, estimate in report.items()}
