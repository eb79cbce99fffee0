"""TRL's SFTTrainer with LoRA: the adapters train, each at the rate of the weight that it adapts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer

from blockwise_lr import classify
from blockwise_lr.integrations.transformers import BlockwiseTrainer, blockwise_optimizer
from integrations.test_transformers import Tokens, arguments
from support import tiny_models

LR = 1e-2
EXPECTED = {"qk": 2 * LR, "vo": 0.7 * LR, "ffn": LR}


llama = partial(tiny_models.llama, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def lora():
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")


def largest_b(model):
    return {
        name: float(p.detach().abs().max()) for name, p in model.named_parameters() if "lora_B" in name
    }  # LoRA begins with B = 0


def rates(trainer):
    return {group["block"]: group["initial_lr"] for group in trainer.optimizer.param_groups}


@pytest.fixture
def sft(tmp_path):
    """Makes an SFTTrainer, or a subclass, with a LoRA peft_config on a tiny LLaMA."""
    trl = pytest.importorskip("trl")
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 40)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>",
    )  # fmt: skip
    rows = [
        {"input_ids": torch.randint(3, 40, (6 + i % 5,), generator=torch.Generator().manual_seed(i)).tolist()}
        for i in range(32)
    ]

    def make(base=trl.SFTTrainer, model=None, **options):
        given = {
            "output_dir": str(tmp_path), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": LR,
            "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
            "bf16": False, "max_length": 16, "gradient_accumulation_steps": 2, **options.pop("settings", {}),
        }  # fmt: skip
        return base(
            model=llama() if model is None else model,
            args=trl.SFTConfig(**given),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora(),
            **options,
        )

    return make


def test_the_factory_trains_the_adapters_that_trl_adds(sft):
    model = llama()
    trainer = sft(model=model, optimizer_cls_and_kwargs=blockwise_optimizer(model, lr=LR))
    trainer.train()
    assert all(value > 0 for value in largest_b(trainer.model).values())
    assert rates(trainer) == pytest.approx(EXPECTED)
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW


def test_the_mixin_of_both_trainers_trains_the_adapters_by_block_and_logs_both(sft):
    trl = pytest.importorskip("trl")

    class BlockwiseSFTTrainer(BlockwiseTrainer, trl.SFTTrainer):
        pass

    trainer = sft(BlockwiseSFTTrainer)
    trainer.train()
    assert all(value > 0 for value in largest_b(trainer.model).values())
    assert rates(trainer) == pytest.approx(EXPECTED)
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert {"lr/qk", "lr/vo", "lr/ffn", "mean_token_accuracy"} <= set(row)


def test_overrides_for_a_model_that_trl_wraps_are_given_as_a_function(sft):
    model = llama()
    early = classify(model, overrides={r"q_proj": "ffn"})
    trainer = sft(model=model, optimizer_cls_and_kwargs=blockwise_optimizer(model, lr=LR, blocks=early))
    with pytest.raises(
        ValueError, match=r"`blocks` has no entry for .*lora_A.* and 11 more: it was made before"
    ):
        trainer.train()
    model = llama()
    factory = blockwise_optimizer(
        model, lr=LR, blocks=lambda model: classify(model, overrides={r"q_proj": "ffn"})
    )
    trainer = sft(model=model, optimizer_cls_and_kwargs=factory)
    trainer.train()
    assert rates(trainer) == pytest.approx({"vo": 0.7 * LR, "ffn": LR})


@pytest.mark.parametrize("read", [False, True])
def test_adapters_added_between_the_factory_and_trainer_are_trained(tmp_path, read):
    model = llama()
    factory = blockwise_optimizer(model, lr=LR)
    if read:
        assert len(factory[1]["params"]) == 6  # what somebody printed before
    adapted = get_peft_model(model, lora())
    trainer = Trainer(adapted, arguments(tmp_path), train_dataset=Tokens(), optimizer_cls_and_kwargs=factory)
    trainer.train()
    assert all(value > 0 for value in largest_b(adapted).values())
    assert rates(trainer) == pytest.approx(EXPECTED)


def test_a_model_with_adapters_in_blockwise_trainer(tmp_path):
    adapted = get_peft_model(llama(), lora())
    trainer = BlockwiseTrainer(adapted, arguments(tmp_path, learning_rate=LR), train_dataset=Tokens())
    trainer.train()
    assert all(value > 0 for value in largest_b(adapted).values())
    assert rates(trainer) == pytest.approx(EXPECTED)
