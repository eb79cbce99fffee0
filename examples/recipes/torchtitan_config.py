"""torchtitan: the groups as its configuration, one pattern for each block, checked against the model's parameters."""

import re

import torch
from torch import nn

from blockwise_lr import param_groups

BASE_LR = 6e-4  # the learning rate that you tuned for one rate


class Attention(nn.Module):
    """The parameters of torchtitan's Llama 3 attention, under their names there."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))


class FeedForward(nn.Module):
    """Its feed-forward network."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(dim, 4 * dim, bias=False) for _ in range(2))
        self.w2 = nn.Linear(4 * dim, dim, bias=False)


class Layer(nn.Module):
    """One of its layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(dim), FeedForward(dim)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)


class Llama3(nn.Module):
    """A stand-in for torchtitan's model: only the names of the parameters matter here."""

    def __init__(self, dim: int = 32, layers: int = 2, vocabulary: int = 64) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleDict({str(index): Layer(dim) for index in range(layers)})
        self.norm = nn.RMSNorm(dim)
        self.output = nn.Linear(dim, vocabulary, bias=False)


def pattern_of(names: list[str]) -> str:
    """One regular expression for the names of a group; the numbers of layers become a wildcard."""
    shapes = {re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in names}
    return f"^(?:{'|'.join(sorted(shapes))})$"


torch.manual_seed(0)
model = Llama3()
groups = param_groups(model, lr=BASE_LR, weight_decay=0.1)
entries = [
    (
        pattern_of(group["names"]),
        {"lr": group["lr"], "betas": (0.9, 0.95), "weight_decay": group["weight_decay"]},
    )
    for group in groups
]

print("from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig\n")
print("optimizer = OptimizersContainer.Config(\n    param_groups=[")
for group, (pattern, settings) in zip(groups, entries, strict=True):
    print(f"        # {group['block']}: ratio {group['lr_ratio']:g}")
    print(
        f'        ParamGroupConfig(pattern=r"{pattern}", optimizer_name="AdamW", optimizer_kwargs={settings}),'
    )
print("    ]\n)")

# torchtitan uses re.search, the first match wins, and every parameter must be in exactly one group.
for group, (pattern, _) in zip(groups, entries, strict=True):
    found = [name for name, _ in model.named_parameters() if re.search(pattern, name)]
    assert sorted(found) == sorted(group["names"])

try:
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
except ImportError as error:
    print(f"\ntorchtitan is not installed ({error}): the patterns were checked without it")
else:
    config = OptimizersContainer.Config(
        implementation="for-loop",
        param_groups=[
            ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=settings)
            for pattern, settings in entries
        ],
    )
    print(config.build(model_parts=[model]))
