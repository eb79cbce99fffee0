"""Ratios of your own, decay that does not grow with them, and a model that the rules need a word about."""

import torch
from torch import nn

from blockwise_lr import Block, classify, param_groups, wsd_schedule


class Gated(nn.Module):
    """A Transformer layer with a gate that is in no block of the paper."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True)
        self.gate = nn.Parameter(torch.ones(3, 2))


model = Gated()
try:
    classify(model)
except ValueError as error:
    print(error)  # names the gate and shows the override to write

blocks = classify(model, overrides={r"^gate$": Block.OTHER})
groups = param_groups(
    model,
    lr=1e-3,
    ratios={"emb": 4, "ffn": 2},  # query, key and value agree, so the fused in_proj_weight need not be split
    decay="constant",  # every block decays as it would at the base learning rate
    no_decay="1d",
    blocks=blocks,
)
optimizer = torch.optim.AdamW(groups, lr=1e-3)
scheduler = wsd_schedule(optimizer, warmup_steps=10, total_steps=300, floor=5e-5)
for group in groups:
    print(
        f"{group['block']:>5}  ratio {group['lr_ratio']:g}  weight decay {group['weight_decay']:g}  {group['names'][0]}"
    )
