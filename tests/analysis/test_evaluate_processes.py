"""The loss on windows and on text, on two processes with different numbers of batches: that of one process."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from blockwise_lr import measure_sharpness
from blockwise_lr.analysis.text_loss import text_loss
from blockwise_lr.train.evaluate_loss import evaluate_loss
from support.cases import gpt2
from support.processes import free_port, spawn

# (windows, batch size): the second process has fewer batches, or none, or a smaller one.
CASES = [(9, 4), (1, 1), (1, 4), (3, 1), (5, 2), (7, 1), (2, 2), (8, 4), (6, 4)]
TEXTS = (["a few words and more", "more"], ["b"] * 5 + ["a longer document than all the others together"])


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows with other tokens each, some of which are not predicted."""

    def __init__(self, count: int) -> None:
        self.ids = torch.randint(3, 40, (count, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.ids[index].clone()
        labels[: 2 + index % 3] = -100
        return {"input_ids": self.ids[index], "labels": labels}


class Letters:
    """An encoder of one token a letter."""

    end_of_text = 0

    def encode(self, texts: list[str]) -> list[Any]:
        return [torch.tensor([*(3 + ord(c) % 30 for c in text), 0]).numpy() for text in texts]


def model() -> Any:
    torch.manual_seed(0)
    return gpt2(n_layer=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def sharded() -> nn.Module:
    made = model()
    for layer in made.transformer.h:
        fully_shard(layer)
    fully_shard(made)
    assert all(isinstance(parameter, DTensor) for parameter in made.parameters())
    return made


def on_texts(made: nn.Module, rank: int) -> Any:
    return text_loss(made, Letters(), TEXTS[rank], context=6, batch_size=1)  # type: ignore[arg-type]


def stepped(made: Any, *, looked: bool) -> float:
    """The loss after an optimizer step that an evaluation stands before."""
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    ids = Windows(4).ids
    made(input_ids=ids, labels=ids).loss.backward()
    if looked:
        evaluate_loss(made, Windows(3), batch_size=2)
    optimizer.step()
    return float(made(input_ids=ids, labels=ids).loss.detach())


def refused(made: nn.Module, batches: Any, **options: Any) -> str:
    with pytest.raises(Exception) as caught:
        measure_sharpness(made, batches, **options)
    return f"{type(caught.value).__name__}: {caught.value}"


def breaking(rank: int) -> Any:
    batch = {"input_ids": Windows(2).ids, "labels": Windows(2).ids}
    yield batch
    if rank == 1:
        raise OSError("the disk is gone")
    yield batch


def two_processes(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    found: dict[str, Any] = {}
    made = sharded()
    ddp = DistributedDataParallel(model())
    for count, batch_size in CASES:
        found[f"fsdp {count} {batch_size}"] = evaluate_loss(made, Windows(count), batch_size=batch_size)
        found[f"ddp {count} {batch_size}"] = evaluate_loss(ddp, Windows(count), batch_size=batch_size)
    assert all(isinstance(parameter, DTensor) for parameter in made.parameters())
    found["text"] = on_texts(made, rank)
    found["same text"] = on_texts(made, 0)
    found["step"] = stepped(sharded(), looked=False), stepped(sharded(), looked=True)
    batch = {"input_ids": Windows(2).ids, "labels": Windows(2).ids}
    found["left over"] = refused(made, [batch] * (1 + rank), accumulate=2)
    found["broken"] = refused(made, breaking(rank))
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    spawn(two_processes, (free_port(), str(folder)), 2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize(("count", "batch_size"), CASES)
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_any_number_of_windows_has_the_loss_of_one_process(
    found: list[dict[str, Any]], kind: str, count: int, batch_size: int
) -> None:
    alone = evaluate_loss(model(), Windows(count), batch_size=batch_size)
    for each in found:
        assert each[f"{kind} {count} {batch_size}"] == pytest.approx(alone, rel=1e-6)


def test_each_process_has_the_loss_of_its_own_text(found: list[dict[str, Any]]) -> None:
    for rank, each in enumerate(found):
        for name, texts in (("text", rank), ("same text", 0)):
            alone = on_texts(model(), texts)
            assert each[name].tokens == alone.tokens
            assert each[name].nats == pytest.approx(alone.nats, rel=1e-6)


def test_an_evaluation_between_backward_and_step_leaves_training_as_it_was(
    found: list[dict[str, Any]],
) -> None:
    for each in found:
        without, with_evaluation = each["step"]
        assert with_evaluation == without
        assert with_evaluation == pytest.approx(stepped(model(), looked=True), rel=1e-4)


def test_what_only_one_process_meets_all_learn(found: list[dict[str, Any]]) -> None:
    assert "accumulate is 2, but there are only 1 batches" in found[0]["left over"]
    assert "another process could not make batch 1: its error is printed there" in found[1]["left over"]
    assert found[1]["broken"] == "OSError: the disk is gone"
    assert "another process could not make batch 2" in found[0]["broken"]
