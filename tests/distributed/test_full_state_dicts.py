"""torch's own full state dicts of sharded training: gathered on two processes, taken up by two and by one, and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from support.processes import free_port, spawn
from support.sharded_training import CASES, started, steps, whole

pytestmark = pytest.mark.slow  # two processes train every case

Found = dict[str, Any]


def gather(model: Any, optimizer: Any, schedule: Any) -> Found:
    """The whole state on every process; a copy, since the counts of steps in it are the optimizer's own tensors."""
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    return copy.deepcopy({"model": weights, "optimizer": moments, "schedule": schedule.state_dict()})


def take_up(state: Found, kind: str, name: str, *, broadcast: bool = False) -> tuple[Any, Any, Any]:
    """A new model and optimizer of another seed, with this state; if `broadcast`, only the first process uses it."""
    model, optimizer, schedule = started(kind, name, seed=1)
    used = not broadcast or distributed.get_rank() == 0
    given = copy.deepcopy(state)  # torch puts this model's shards into what it is given
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    # Not by set_state_dict, which takes an empty state for one without a model, and then waits for ever.
    set_model_state_dict(model, given["model"] if used else {}, options=options)
    set_optimizer_state_dict(model, optimizer, given["optimizer"] if used else {}, options=options)
    schedule.load_state_dict(state["schedule"])
    return model, optimizer, schedule


def there_and_back(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found: dict[str, Found] = {}
    for kind, name in CASES:
        running = started(kind, name)
        steps(*running, range(3))
        state = gather(*running)
        each: Found = {"state": state, "weights": whole(running[0])}
        for broadcast in (False, True):
            taken = take_up(state, kind, name, broadcast=broadcast)
            each[f"loaded {broadcast}"] = whole(taken[0])
            each[f"losses {broadcast}"] = steps(*taken, range(3, 6))
        each["losses"] = steps(*running, range(3, 6))
        found[f"{kind} {name}"] = each
    if rank == 0:
        torch.save(found, folder / "found.pt")
    distributed.barrier()  # one that is gone while another still listens aborts that one
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    folder = tmp_path_factory.mktemp("full")
    spawn(there_and_back, (free_port(), folder), 2)
    loaded: dict[str, Found] = torch.load(folder / "found.pt", weights_only=True)
    assert len(loaded) == len(CASES)
    return loaded


@pytest.mark.parametrize("broadcast", [False, True])
def test_two_processes_go_on_from_a_full_state_to_the_bit(found: dict[str, Found], broadcast: bool) -> None:
    for case, each in found.items():
        for name, weight in each["weights"].items():
            assert torch.equal(each[f"loaded {broadcast}"][name], weight), f"{case} {name}"
        assert each[f"losses {broadcast}"] == each["losses"], case


def test_one_process_goes_on_from_it(found: dict[str, Found]) -> None:
    for kind, name in CASES:
        each = found[f"{kind} {name}"]
        model, *rest = take_up(each["state"], kind, name)
        assert all(torch.equal(weight, each["weights"][key]) for key, weight in whole(model).items())
        off = max(abs(a - b) for a, b in zip(steps(model, *rest, range(3, 6)), each["losses"]))
        assert off < 1e-5, f"{kind} {name}: {off:g}"
