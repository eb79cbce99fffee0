"""Chunks cover everything once and change no result; kernels and host syncs do not grow with the number of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwise_lr import AdamMini, Block, measure_directional, param_groups, split_fused
from blockwise_lr.blocks.block import PartSlice
from blockwise_lr.directional import parameter_chunks, update_signals
from blockwise_lr.directional.parameter_chunks import chunks
from blockwise_lr.directional.state_updates import StateUpdates
from blockwise_lr.directional.updates import groups_by_parameter
from directional.literal import slopes, updates_of
from support import tiny_models
from support.device_work import counted_work

IDS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))


def logits_and_labels(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    return model(input_ids=batch).logits[:, :-1], batch[:, 1:]


def trained(
    family: str, kind: type[torch.optim.Optimizer], dtype: torch.dtype = torch.float64, **settings: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A tiny model after three steps. Parameters of one block have taken unequal numbers of steps."""
    make = {"llama": tiny_models.llama, "gpt2": tiny_models.gpt2}[family]
    model = split_fused(make(seed=0, **settings)).to(dtype).eval()
    optimizer = kind(param_groups(model, lr=2e-3), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        optimizer.zero_grad()
        ids = torch.randint(40, (2, 9), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        if step == 1:
            next(p for name, p in model.named_parameters() if "1.mlp" in name).grad = None
        optimizer.step()
    return model, optimizer


SIZES = [1, 7, 64, 1000, 1 << 20]


@pytest.mark.parametrize("elements", SIZES)
def test_chunks_cover_every_element_once(elements) -> None:
    tensors = [torch.zeros(6, 4), torch.zeros(6, 4), torch.zeros(12, 3), torch.zeros(()), torch.zeros(0, 3)]
    fused = [(Block.QK, PartSlice(0, 0, 4, 2)), (Block.VO, PartSlice(0, 4, 2, 2))]
    parts = [[(Block.FFN, None)], [(Block.FFN, None)], fused, [(Block.NORM, None)], [(Block.NORM, None)]]
    found = list(chunks(parts, tensors, [None] * 5, elements))
    for chunk in found:
        stack = chunk.stack(tensors)
        assert stack.numel() <= max(elements, 12)
        for i in chunk.indices:
            chunk.view(tensors[i]).add_(1 if chunk.block is not Block.VO else 10)
    assert all((tensor == 1).all() for i, tensor in enumerate(tensors) if i != 2)
    rows = tensors[2].view(2, 6, 3)
    assert (rows[:, :4] == 1).all()
    assert (rows[:, 4:] == 10).all()
    if elements == SIZES[-1]:
        assert len(found) == 4


@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, AdamMini])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_updates_by_chunk_are_those_of_whole_parameters(family, kind, elements) -> None:
    model, optimizer = trained(family, kind)
    parameters = list(model.parameters())
    updates = StateUpdates(optimizer, parameters, groups_by_parameter(optimizer, parameters))
    expected = updates_of(optimizer, parameters)
    seen = [torch.full_like(parameter, torch.nan) for parameter in parameters]
    for chunk in chunks([[(Block.OTHER, None)]] * len(parameters), parameters, updates.kinds, elements):
        for i, update in zip(chunk.indices, updates.of(chunk)):
            chunk.view(seen[i]).copy_(update)
    for found, whole in zip(seen, expected):
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("elements", [7, 64, 1 << 20])
@pytest.mark.parametrize(
    ("kind", "dtype", "move", "error"),
    [
        (torch.optim.AdamW, torch.float64, 1e-5, 1e-9),
        (AdamMini, torch.float64, 1e-5, 1e-9),
        (torch.optim.AdamW, torch.float32, 1e-3, 1e-4),
        (AdamMini, torch.float32, 1e-3, 1e-4),
    ],
    ids=str,
)
def test_a_report_is_that_of_a_measurement_that_keeps_everything(
    kind, dtype, move, error, elements, monkeypatch
) -> None:
    """GPT-2 computes in the dtype of its parameters throughout, so equal means equal up to that dtype's rounding."""
    monkeypatch.setattr(parameter_chunks, "_CPU_ELEMENTS", (elements, elements))
    model, optimizer = trained("gpt2", kind, dtype)
    report = measure_directional(model, optimizer, [IDS], loss_fn=logits_and_labels, move=move)
    signals, matrix = slopes(model, optimizer, IDS, logits_and_labels, move)
    assert list(report) == list(signals)
    for i, (block, slope) in enumerate(report.items()):
        assert slope.signal == pytest.approx(signals[block], rel=error, abs=error * abs(slope.signal))
        for j in range(len(signals)):
            scale = (matrix[i][i] * matrix[j][j]) ** 0.5
            assert report.matrix[i][j] == pytest.approx(matrix[i][j], abs=100 * error * scale)


def deep(layers: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = tiny_models.llama(hidden_size=8, intermediate_size=16, num_hidden_layers=layers)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3), lr=1e-3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.slow
def test_kernels_do_not_grow_with_the_layers_and_the_host_waits_once_a_batch(monkeypatch) -> None:
    """Kernels outside forward and backward passes; and inside the latter, the sums over gradients."""
    dot, dots = update_signals.dot, []
    monkeypatch.setattr(update_signals, "dot", lambda a, b: dots.append(1) or dot(a, b))
    batch, found = {"input_ids": IDS, "labels": IDS}, []
    for layers in (2, 12, 48):
        model, optimizer = deep(layers)
        dots.clear()
        with counted_work(model) as work:
            measure_directional(model, optimizer, [batch] * 3)
        assert work.waits <= 3 + 1, work.waits_of  # one for the lengths of the updates
        found.append((work.kernels, len(dots)))
    kernels, sums = zip(*found)
    assert kernels[0] == kernels[1] == kernels[2]
    assert max(sums) <= 8 * sums[0]  # a backward pass passes gradients on in at most eight groups
