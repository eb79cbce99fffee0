"""A split model's checkpoints are those of the original model: transformers never sees the split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from blockwise_lr.blocks import classify, merge_fused, split_fused
from support.case import VOCAB
from support.cases import gpt2

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(10)[None]


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_split_model_is_the_original_file(tmp_path: Path, tied: bool) -> None:
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model = gpt2(n_layer=2, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "whole")
    split_fused(model).save_pretrained(tmp_path / "split")
    whole, split = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "split"))
    assert list(whole) == list(split)
    assert all(torch.equal(whole[key], split[key]) for key in whole)

    for loader in (transformers.GPT2LMHeadModel, transformers.AutoModelForCausalLM):
        loaded, info = loader.from_pretrained(tmp_path / "split", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert torch.equal(loaded.eval()(TOKENS).logits, model(TOKENS).logits)


def test_a_split_model_is_saved_in_shards_like_any_other(tmp_path: Path) -> None:
    model = split_fused(gpt2(n_layer=3))
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(TOKENS).logits, model(TOKENS).logits)


def train(out: Path, steps: int, resume: bool = False) -> nn.Module:
    """A transformers.Trainer run of `steps` steps on a split GPT-2, with a schedule made for 6."""
    transformers.set_seed(0)
    model = split_fused(gpt2(n_layer=2))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(VOCAB, (24, 10))]
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=6,
        per_device_train_batch_size=4,
        save_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )

    class StopAt(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            control.should_training_stop = control.should_training_stop or state.global_step >= steps

    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[StopAt()])
    trainer.train(resume_from_checkpoint=resume)
    assert parametrize.is_parametrized(model.transformer.h[0].attn.c_attn, "weight")
    return model.eval()


def test_trainer_saves_and_resumes_a_split_model(tmp_path: Path) -> None:
    uninterrupted = train(tmp_path / "one", steps=6)
    train(tmp_path / "two", steps=3)
    assert (tmp_path / "two" / "checkpoint-3").is_dir()
    assert not (tmp_path / "two" / "checkpoint-6").exists()
    resumed = train(tmp_path / "two", steps=6, resume=True)
    for name, param in uninterrupted.named_parameters():
        assert torch.equal(param, dict(resumed.named_parameters())[name]), name

    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "two" / "checkpoint-6").eval()
    assert torch.equal(loaded(TOKENS).logits, resumed(TOKENS).logits)
    assert set(loaded.state_dict()) == set(merge_fused(resumed).state_dict())


def test_a_checkpoint_loads_into_a_model_that_is_split_afterwards(tmp_path: Path) -> None:
    model = split_fused(gpt2())
    model.save_pretrained(tmp_path)
    loaded = split_fused(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)).eval()
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert dict(classify(loaded)) == dict(classify(model))


def test_the_distributed_checkpoint_api_sees_the_original_layout_on_one_process() -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    whole, model = gpt2(), split_fused(gpt2())
    state = {key: value + 1 for key, value in get_model_state_dict(whole).items()}
    assert list(get_model_state_dict(model)) == list(state)
    set_model_state_dict(model, state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
