"""A diffusion Transformer as in the paper's own code (arXiv 2212.09748): tiny, and nothing taken from there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from support.case import WIDTH
from support.handwritten import PatchEmbed, VisionAttention, VisionMlp


class TimestepEmbedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(6, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, timestep: Tensor) -> Tensor:
        angles = timestep[:, None] / torch.tensor([1.0, 10.0, 100.0])
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(11, WIDTH)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


def modulation(parts: int) -> nn.Module:
    return nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, parts * WIDTH))


class DiTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp, self.adaLN_modulation = VisionAttention(), VisionMlp(), modulation(6)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        parts = self.adaLN_modulation(conditioning)[:, None].chunk(6, dim=-1)
        x = x + parts[2] * self.attn(self.norm1(x) * (1 + parts[1]) + parts[0])
        return x + parts[5] * self.mlp(self.norm2(x) * (1 + parts[4]) + parts[3])


class FinalLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.linear, self.adaLN_modulation = nn.Linear(WIDTH, 12), modulation(2)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(conditioning)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class ReferenceDiT(nn.Module):
    """Positions are not learned; the timestep and a class scale and shift every norm."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder, self.y_embedder = PatchEmbed(), TimestepEmbedder(), LabelEmbedder()
        self.pos_embed = nn.Parameter(torch.randn(1, 4, WIDTH), requires_grad=False)
        self.blocks, self.final_layer = nn.ModuleList([DiTBlock(), DiTBlock()]), FinalLayer()

    def forward(self, latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        x = self.x_embedder(latents[:, :3]) + self.pos_embed
        conditioning = self.t_embedder(timestep) + self.y_embedder(labels)
        for block in self.blocks:
            x = block(x, conditioning)
        return self.final_layer(x, conditioning)
