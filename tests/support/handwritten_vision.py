"""Vision models as people write them by hand, after LeViT, Hiera and CaiT of timm: tiny, nothing taken from there."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import hardswish

from support.case import WIDTH
from support.handwritten import HEADS, PatchEmbed, VisionMlp, attend, heads_of

CLASSES = 10

# LeViT ---------------------------------------------------------------------------------------


class LinearNorm(nn.Module):
    """A matrix with its norm behind it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class LevitAttention(nn.Module):
    """Keys narrower than values; head by head the query, the key, the value; a learned bias for each distance."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim = HEADS, 3, 5
        self.qkv = LinearNorm(WIDTH, HEADS * (2 * 3 + 5))
        self.proj = nn.Sequential(nn.Hardswish(), LinearNorm(HEADS * 5, WIDTH))
        self.attention_biases = nn.Parameter(torch.randn(HEADS, 4))

    def forward(self, x: Tensor) -> Tensor:
        by_head = self.qkv(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        q, k, v = by_head.split([3, 3, 5], dim=-1)
        scores = q @ k.transpose(-2, -1) + self.attention_biases[:, None]
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class LevitMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = LinearNorm(WIDTH, 2 * WIDTH), LinearNorm(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln2(hardswish(self.ln1(x)))


class LevitBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = LevitAttention(), LevitMlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class NormLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.linear = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.bn(x))


class Levit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stages = PatchEmbed(), nn.ModuleList([LevitBlock()])
        self.head, self.head_dist = NormLinear(), NormLinear()

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages[0](self.stem(images)).mean(dim=1)
        return self.head(x) + self.head_dist(x)


# Hiera ---------------------------------------------------------------------------------------


class MaskUnitAttention(nn.Module):
    """From the width of one stage to twice that."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2 * HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 6 * WIDTH), nn.Linear(2 * WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(t) for t in self.qkv(x).chunk(3, dim=-1))
        return self.proj(attend(q, k, v, causal=False))


class HieraBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.proj = (
            nn.LayerNorm(WIDTH),
            MaskUnitAttention(),
            nn.Linear(WIDTH, 2 * WIDTH),
        )
        self.norm2 = nn.LayerNorm(2 * WIDTH)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(2 * WIDTH, 20), "fc2": nn.Linear(20, 2 * WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x)
        x = self.proj(x) + self.attn(x)
        return x + self.mlp["fc2"](self.mlp["fc1"](self.norm2(x)).relu())


class Hiera(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.pos_embed = PatchEmbed(), nn.Parameter(torch.randn(1, 4, WIDTH))
        self.blocks, self.norm = nn.ModuleList([HieraBlock()]), nn.LayerNorm(2 * WIDTH)
        self.head = nn.ModuleDict({"fc": nn.Linear(2 * WIDTH, CLASSES)})

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks[0](self.patch_embed(images) + self.pos_embed)
        return self.head["fc"](self.norm(x).mean(dim=1))


# CaiT ----------------------------------------------------------------------------------------


class TalkingHeadAttn(nn.Module):
    """Matrices mix the scores of the heads before the softmax, and the weights after it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.proj_l, self.proj_w = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(t) for t in self.qkv(x).chunk(3, dim=-1))
        scores = self.proj_l((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.proj_w(scores.softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class LayerScaleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = (
            nn.LayerNorm(WIDTH),
            TalkingHeadAttn(),
            nn.LayerNorm(WIDTH),
            VisionMlp(),
        )
        self.gamma_1, self.gamma_2 = (nn.Parameter(0.1 * torch.ones(WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class Cait(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.pos_embed = PatchEmbed(), nn.Parameter(torch.randn(1, 4, WIDTH))
        self.cls_token_0 = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks, self.norm = nn.ModuleList([LayerScaleBlock()]), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed
        x = torch.cat([self.cls_token_0.expand(len(x), -1, -1), x], dim=1)
        return self.head(self.norm(self.blocks[0](x))[:, 0])
