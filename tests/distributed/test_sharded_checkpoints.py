"""Checkpoints of sharded training: saved by two processes, taken up by one and by two again."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata
from transformers import AutoModelForCausalLM

from blockwise_lr import (
    AdamMini,
    AutoRatios,
    AutoRule,
    Block,
    classify,
    cosine_schedule,
    param_groups,
    scale_by_block,
)
from blockwise_lr.checkpoints import sharded_folder
from blockwise_lr.checkpoints.hugging_face import export_checkpoint
from blockwise_lr.checkpoints.manifest import seal
from blockwise_lr.checkpoints.sharded_contents import load_target
from blockwise_lr.checkpoints.sharded_folder import load_sharded, save_sharded
from blockwise_lr.errors import StorageError, UserError
from blockwise_lr.optim import cosine
from support.commands import call
from support.processes import free_port, spawn
from support.sharded_training import CASES, OPTIMIZERS, RATIOS, started, steps, whole


def save_and_go_on(folder: Path, found: dict[str, Any]) -> None:
    for kind, name in CASES:
        model, optimizer, schedule = started(kind, name)
        steps(model, optimizer, schedule, range(3))
        save_sharded(folder / f"{kind}-{name}" / "checkpoint-3", model, optimizer, schedule)
        found[f"{kind} {name}"] = whole(model), steps(model, optimizer, schedule, range(3, 6))


def take_up(folder: Path, found: dict[str, Any], again: str = "") -> None:
    for kind, name in CASES:
        model, optimizer, schedule = started(kind, name, seed=1)
        load_sharded(folder / f"{kind}-{name}" / "checkpoint-3", model, optimizer, schedule)
        loaded = whole(model)
        if again:
            save_sharded(folder / again / f"{kind}-{name}" / "checkpoint-3", model, optimizer, schedule)
        found[f"{kind} {name}"] = loaded, steps(model, optimizer, schedule, range(3, 6))


def worker(rank: int, world: int, port: int, folder: Path, job: str, again: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    found: dict[str, Any] = {}
    if job == "save":
        save_and_go_on(folder, found)
    else:
        take_up(folder / job, found, again)
    if rank == 0:
        torch.save(found, folder / f"found-{world}.pt")
    distributed.barrier()  # one that is gone while another still listens aborts that one
    distributed.destroy_process_group()


def on(world: int, folder: Path, job: str, again: str = "") -> dict[str, Any]:
    spawn(worker, (world, free_port(), folder, job, again), world)
    found: dict[str, Any] = torch.load(folder / f"found-{world}.pt", weights_only=True)
    return found


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for case, (weights, losses) in expected.items():
        assert all(torch.equal(weights[name], value) for name, value in found[case][0].items()), case
        assert found[case][1] == pytest.approx(losses, abs=1e-5 if "muon" in case else 1e-6), case


@pytest.mark.slow
def test_saved_on_two_it_goes_on_on_one_and_on_two_again(tmp_path: Path) -> None:
    expected = on(2, tmp_path, "save")
    alone: dict[str, Any] = {}
    take_up(tmp_path, alone, again="one")
    same(alone, expected)
    same(on(2, tmp_path, "one"), expected)


@pytest.mark.slow
def test_saved_on_four_then_on_two_then_on_one_it_goes_on_on_four(tmp_path: Path) -> None:
    expected = on(4, tmp_path, "save")
    same(on(2, tmp_path, ".", again="two"), expected)
    alone: dict[str, Any] = {}
    take_up(tmp_path / "two", alone, again="../one")
    same(alone, expected)
    same(on(4, tmp_path, "one"), expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_export_gives_a_folder_that_transformers_loads(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    model, optimizer, schedule = started(kind, "adamw")
    steps(model, optimizer, schedule, range(3))
    saved, out = tmp_path / "checkpoint-3", tmp_path / "plain"
    save_sharded(saved, model, optimizer, schedule)
    code, printed, errors = call(capsys, "export", saved, "--to", "huggingface", "--out", out)
    assert (code, printed) == (0, f"{out}: the model of {saved}\n"), errors
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    assert not any("parametrizations" in name for name, _ in loaded.named_parameters())
    ids = torch.arange(3, 11)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    code, _, errors = call(capsys, "export", saved, "--out", out)
    assert code == 2
    assert "has files already: choose another --out" in errors
    (saved / "sharded.json").write_text("{}")
    code, _, errors = call(capsys, "export", saved, "--out", tmp_path / "other")
    assert code == 2
    assert "is not a complete checkpoint: sharded.json has 2 bytes" in errors
    assert not (tmp_path / "other").exists()


def test_export_keeps_the_precision_of_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    model, optimizer, schedule = started("gpt2", "adamw")
    model.config.dtype = torch.bfloat16  # as in the config.json that the model may be built from
    steps(model, optimizer, schedule, range(3))
    model.transformer.ln_f.to(torch.bfloat16)
    save_sharded(tmp_path / "run" / "checkpoint-3", model, optimizer, schedule)
    code, _, errors = call(
        capsys, "export", tmp_path / "run", "--to", "huggingface", "--out", tmp_path / "plain"
    )
    assert code == 0, errors
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    for name in ("transformer.ln_f.weight", "transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"):
        assert torch.equal(stored[name], model.state_dict()[name])
        assert stored[name].dtype == (torch.bfloat16 if "ln_f" in name else torch.float32)


@pytest.mark.parametrize("command", ["eval", "generate", "sharpness"])
def test_a_command_on_a_sharded_checkpoint_names_the_export(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer, schedule = started("gpt2", "adamw")
    saved = tmp_path / "a run" / "checkpoint-0"
    save_sharded(saved, model, optimizer, schedule)
    code, _, errors = call(capsys, command, saved)
    assert (code, errors.count("\n")) == (2, 1)
    (advice,) = re.findall(r"first export it, blockwise-lr (.*)", errors)
    words = shlex.split(advice.replace("NEW-FOLDER", shlex.quote(str(tmp_path / "plain"))))
    assert call(capsys, *words)[0] == 0
    assert (tmp_path / "plain" / "model.safetensors").is_file()


def test_a_model_that_is_not_a_causal_language_model_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer, _ = started("llama", "adamw")
    checkpoint = tmp_path / "checkpoint-1"
    save_sharded(checkpoint, model, optimizer)
    (checkpoint / "config.json").write_text('{"model_type": "vit"}')
    seal(checkpoint)
    code, _, err = call(capsys, "export", checkpoint, "--to", "huggingface", "--out", tmp_path / "plain")
    assert (code, err.count("\n")) == (2, 1), err
    assert f"the model in {checkpoint} cannot be built (ValueError: " in err
    assert "expected a causal language model" in err
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_hostile_description_of_tensors_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "run by the loader"),)

    model, optimizer, schedule = started("llama", "adamw")
    save_sharded(tmp_path / "checkpoint-1", model, optimizer, schedule)
    for content in (pickle.dumps(Hostile()), pickle.dumps([1]), b"", b"no pickle"):
        (tmp_path / "checkpoint-1" / ".metadata").write_bytes(content)
        seal(tmp_path / "checkpoint-1")
        with pytest.raises(UserError, match=r"\.metadata is not a description of tensors \("):
            load_sharded(tmp_path / "checkpoint-1", model, optimizer)
    assert not (tmp_path / "run by the loader").exists()


def test_all_settings_of_the_groups_come_back(tmp_path: Path) -> None:
    model, optimizer, _ = started("llama", "adamw")
    for group in optimizer.param_groups:
        group.update(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, lr=0.25)
    save_sharded(tmp_path / "checkpoint-1", model, optimizer)
    model, again, _ = started("llama", "adamw")
    load_sharded(tmp_path / "checkpoint-1", model, again)
    for old, new in zip(optimizer.param_groups, again.param_groups, strict=True):
        assert {k: v for k, v in old.items() if k != "params"} == {
            k: v for k, v in new.items() if k != "params"
        }


def test_partitions_stay_with_their_parameters_in_whatever_order_these_are(tmp_path: Path) -> None:
    model, optimizer, schedule = started("llama", "adam-mini")
    steps(model, optimizer, schedule, range(3))
    save_sharded(tmp_path / "checkpoint-3", model, optimizer, schedule)
    expected = steps(model, optimizer, schedule, range(3, 6))
    model, _, _ = started("llama", "adam-mini", seed=1)
    groups = param_groups(model, 1e-3, RATIOS)
    for group in groups:
        for key in ("params", "names"):
            group[key] = group[key][::-1]
    optimizer = AdamMini(groups)
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=20, floor=0.0)
    before = [group["partitions"] for group in optimizer.param_groups]
    assert any(partitions != partitions[::-1] for partitions in before)
    load_sharded(tmp_path / "checkpoint-3", model, optimizer, schedule)
    assert [group["partitions"] for group in optimizer.param_groups] == before
    assert steps(model, optimizer, schedule, range(3, 6)) == expected


@pytest.mark.parametrize("signal", ["consistency", "cosine"])
def test_ratios_that_auto_has_moved_go_on_to_the_bit(tmp_path: Path, signal: Any) -> None:
    def with_auto(seed: int) -> tuple[Any, Any, Any, AutoRatios]:
        model, optimizer, schedule = started("llama", "adamw", seed=seed)
        return model, optimizer, schedule, AutoRatios(optimizer, schedule, AutoRule(signal=signal))

    model, optimizer, schedule, auto = with_auto(0)
    steps(model, optimizer, schedule, range(8))
    before = auto.ratios
    assert before["vo"] != pytest.approx(RATIOS["vo"])  # type: ignore[index]
    save_sharded(tmp_path / "checkpoint-8", model, optimizer, schedule)
    expected = steps(model, optimizer, schedule, range(8, 14))
    model, optimizer, schedule, again = with_auto(1)
    load_sharded(tmp_path / "checkpoint-8", model, optimizer, schedule)
    assert again.ratios == before
    assert steps(model, optimizer, schedule, range(8, 14)) == expected
    assert again.ratios == auto.ratios
    model, optimizer, schedule = started("llama", "adamw", seed=1)
    with pytest.raises(UserError, match=r"lr_ratio of .* is .* there and"):  # nothing moves them here
        load_sharded(tmp_path / "checkpoint-8", model, optimizer, schedule)


def test_a_longer_schedule_goes_on_by_its_own_settings_and_names_the_change(tmp_path: Path) -> None:
    model, optimizer, schedule = started("llama", "adamw")
    steps(model, optimizer, schedule, range(3))
    save_sharded(tmp_path / "checkpoint-3", model, optimizer, schedule)
    model, optimizer, _ = started("llama", "adamw", seed=1)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    held = [group["lr"] for group in optimizer.param_groups]  # as a compiled step does
    longer = cosine_schedule(optimizer, warmup_steps=2, total_steps=60, floor=0.0)
    with pytest.warns(UserWarning, match=r"goes on at step 3 with other settings .*: total_steps 20 -> 60$"):
        load_sharded(tmp_path / "checkpoint-3", model, optimizer, longer)
    for group, lr in zip(optimizer.param_groups, held):
        assert group["lr"] is lr
        expected = cosine(3, peak=group["initial_lr"], warmup_steps=2, total_steps=60, floor=0.0)
        assert float(lr) == pytest.approx(expected)
    model, optimizer, _ = started("llama", "adamw", seed=1)
    short = cosine_schedule(optimizer, warmup_steps=1, total_steps=2)
    with pytest.raises(
        UserError, match="checkpoint-3: 3 steps are done, and the schedule was made for total_s"
    ):
        load_sharded(tmp_path / "checkpoint-3", model, optimizer, short)


def failing_save(rank: int, port: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, optimizer, _ = started("llama", "adamw")
    said = []
    for name in ("checkpoint-1", "file/checkpoint-1"):
        try:
            save_sharded(folder / name, model, optimizer)
        except (UserError, StorageError) as error:
            said.append(str(error))
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    distributed.barrier()  # one that is gone while another still listens aborts that one
    distributed.destroy_process_group()


def test_what_fails_on_rank_0_is_raised_on_all(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "file").touch()
    spawn(failing_save, (free_port(), tmp_path), 2)
    said = [json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1]
    assert "is there already" in said[0][0]
    assert re.search(r"cannot write .*/file/.checkpoint-1 \(Not a directory\)", said[0][1])


def test_a_model_whose_config_is_not_of_transformers_is_saved_without_it(tmp_path: Path) -> None:
    def made() -> tuple[Any, Any]:
        model: Any = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        model.config = SimpleNamespace(n_embd=4)  # as in nanoGPT
        blocks = classify(model, {r"^0\.": Block.EMB, r"^1\.": Block.HEAD})
        return model, torch.optim.AdamW(param_groups(model, 1e-3, blocks=blocks), lr=1e-3)

    model, optimizer = made()
    model(torch.arange(5)).sum().backward()
    optimizer.step()
    save_sharded(tmp_path / "checkpoint-1", model, optimizer)
    again, loaded = made()
    load_sharded(tmp_path / "checkpoint-1", again, loaded)
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_the_config_of_a_model_in_a_wrapper_such_as_ddp_is_saved_for_the_export(tmp_path: Path) -> None:
    model, _, _ = started("llama", "adamw")
    wrapped = nn.DataParallel(model)
    optimizer = OPTIMIZERS["adamw"](param_groups(wrapped, 1e-3, RATIOS))
    save_sharded(tmp_path / "checkpoint-1", wrapped, optimizer)
    export_checkpoint(tmp_path / "checkpoint-1", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    assert all(torch.equal(plain[name], value) for name, value in model.state_dict().items())


def test_a_state_that_is_not_of_tensors_is_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    model, optimizer, _ = started("llama", "adamw")
    optimizer.state[model.lm_head.weight]["GG"] = [torch.eye(2)]  # as in SOAP
    with pytest.raises(
        UserError, match="AdamW keeps list under 'GG' in the state of lm_head.weight; a sharded"
    ):
        save_sharded(tmp_path / "checkpoint-1", model, optimizer)
    assert not list(tmp_path.iterdir())


def test_the_moments_of_a_number_are_on_its_device_and_its_steps_on_the_host() -> None:
    parameter = nn.Parameter(torch.empty((), device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    about = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(()), [])
    devices = [load_target(key, about, parameter, optimizer).device.type for key in ("exp_avg", "step")]
    assert devices == ["meta", "cpu"]


def test_steps_are_counted_where_the_saved_settings_need_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused optimizer counts them on the device, and the setting comes back from the checkpoint."""
    model, optimizer, schedule = started("llama", "adamw")
    for group in optimizer.param_groups:
        group["fused"] = True
    steps(model, optimizer, schedule, range(1))
    save_sharded(tmp_path / "checkpoint-1", model, optimizer)
    model, again, _ = started("llama", "adamw", seed=1)
    seen = set()

    def watched(key: str, about: Any, parameter: Any, optimizer: Any) -> Any:
        seen.update(group["fused"] for group in optimizer.param_groups)
        return load_target(key, about, parameter, optimizer)

    monkeypatch.setattr(sharded_folder, "load_target", watched)
    load_sharded(tmp_path / "checkpoint-1", model, again)
    assert seen == {True}


class TestChanges:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        model, optimizer, schedule = started("llama", "adamw")
        steps(model, optimizer, schedule, range(3))
        save_sharded(tmp_path / "checkpoint-3", model, optimizer, schedule)
        return tmp_path / "checkpoint-3"

    def test_other_ratios_are_named_and_adopted_when_asked(self, folder: Path) -> None:
        model, optimizer, schedule = started("llama", "adamw", {**RATIOS, "vo": 0.25}, seed=1)
        with pytest.raises(UserError, match=r'lr_ratio of vo is 0\.5 there and 0\.25 here.*changed="adopt"'):
            load_sharded(folder, model, optimizer, schedule)
        assert not optimizer.state
        load_sharded(folder, model, optimizer, schedule, changed="adopt")
        lr = {group["block"]: group["lr"] for group in optimizer.param_groups}
        assert lr["vo"] == pytest.approx(0.25 * lr["norm"])
        assert all("exp_avg" in optimizer.state[p] for p in model.parameters())

    def test_a_group_removed_and_one_added(self, folder: Path, tmp_path: Path) -> None:
        model, _, _ = started("llama", "adamw", seed=1)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "norm" not in name
        fewer = OPTIMIZERS["adamw"](param_groups(model, 1e-3, RATIOS))
        with pytest.raises(UserError, match=r"layernorm\.weight \(norm\) was trained there and is not here"):
            load_sharded(folder, model, fewer)
        load_sharded(folder, model, fewer, changed="adopt")
        save_sharded(tmp_path / "checkpoint-4", model, fewer)
        model, optimizer, _ = started("llama", "adamw", seed=2)
        with pytest.raises(UserError, match=r"\(norm\) was not trained there and is here"):
            load_sharded(tmp_path / "checkpoint-4", model, optimizer)
        load_sharded(tmp_path / "checkpoint-4", model, optimizer, changed="adopt")
        assert model.model.norm.weight not in optimizer.state
        assert model.lm_head.weight in optimizer.state

    def test_another_model_and_a_damaged_folder(self, folder: Path) -> None:
        model, optimizer, _ = started("gpt2", "adamw")
        with pytest.raises(UserError, match=r"was saved with other groups"):
            load_sharded(folder, model, optimizer)
        with pytest.raises(UserError, match=r"is of another model: .* has shape"):
            load_sharded(folder, model, optimizer, changed="adopt")
        next(folder.glob("*.distcp")).unlink()
        with pytest.raises(UserError, match=r"is not a complete checkpoint: .*distcp is missing"):
            load_sharded(folder, *started("llama", "adamw")[:2])

    def test_names(self, folder: Path) -> None:
        model, optimizer, _ = started("llama", "adamw")
        with pytest.raises(UserError, match=r"is there already"):
            save_sharded(folder, model, optimizer)
        with pytest.raises(UserError, match=r"is named last; expected checkpoint-STEP"):
            save_sharded(folder.with_name("last"), model, optimizer)
        with pytest.raises(UserError, match=r"has no names: make the groups with param_groups"):
            save_sharded(folder.with_name("checkpoint-5"), model, torch.optim.SGD(model.parameters(), lr=1.0))
        assert json.loads((folder / "sharded.json").read_text())["schedule"] == 3


def test_a_schedule_that_is_scaled_by_block_is_kept_out_and_the_message_says_how_to_save_it(
    tmp_path: Path,
) -> None:
    model, optimizer, _ = started("llama", "adamw")
    schedule = scale_by_block(torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=20))
    folder = tmp_path / "checkpoint-3"
    with pytest.raises(
        UserError, match=r"leave the schedule out here, and save its state_dict\(\) with torch"
    ):
        save_sharded(folder, model, optimizer, schedule)
    steps(model, optimizer, schedule, range(3))
    save_sharded(folder, model, optimizer)
    torch.save(schedule.state_dict(), tmp_path / "schedule.pt")
    expected = steps(model, optimizer, schedule, range(3, 6))

    model, optimizer, _ = started("llama", "adamw", seed=1)
    schedule = scale_by_block(torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=20))
    with pytest.raises(UserError, match="leave the schedule out here"):
        load_sharded(folder, model, optimizer, schedule)
    load_sharded(folder, model, optimizer)
    schedule.load_state_dict(torch.load(tmp_path / "schedule.pt", weights_only=True))
    assert steps(model, optimizer, schedule, range(3, 6)) == expected
