"""Small language models without attention, as people write them by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH = 16


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class MixerLayer(nn.Module):
    """MLP-Mixer: one MLP over the tokens, one over the channels."""

    def __init__(self, context: int = 8) -> None:
        super().__init__()
        self.norm1, self.mlp_tokens = nn.LayerNorm(WIDTH), Mlp(context, 2 * context)
        self.norm2, self.mlp_channels = nn.LayerNorm(WIDTH), Mlp(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class StateSpaceMixer(nn.Module):
    """As S4: a diagonal state, and a gated projection in and out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log, self.D = nn.Parameter(torch.zeros(WIDTH, 4)), nn.Parameter(torch.ones(WIDTH))
        self.in_proj, self.out_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.in_proj(x).chunk(2, dim=-1)
        mixed = value.cumsum(1) * self.A_log.exp().mean(-1) + value * self.D
        return self.out_proj(mixed * gate.sigmoid())


class StateSpaceLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(WIDTH), StateSpaceMixer()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class LanguageModel(nn.Module):
    """Tokens, layers in a list, a norm and a head whose names say nothing."""

    def __init__(self, layer: Callable[[], nn.Module], vocabulary: int, depth: int) -> None:
        super().__init__()
        self.a = nn.Embedding(vocabulary, WIDTH)
        self.b = nn.ModuleList([layer() for _ in range(depth)])
        self.c, self.d = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.a(tokens)
        for layer in self.b:
            x = layer(x)
        return self.d(self.c(x))


class LSTMLanguageModel(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.encoder, self.rnn = nn.Embedding(vocabulary, WIDTH), nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)
        self.decoder = nn.Linear(WIDTH, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.rnn(self.encoder(tokens))[0])
