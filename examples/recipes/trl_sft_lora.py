"""TRL's SFTTrainer with LoRA: BlockwiseTrainer is mixed in, and each adapter has the block of the weight it adapts."""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from blockwise_lr.integrations.transformers import BlockwiseTrainer


class BlockwiseSFTTrainer(BlockwiseTrainer, SFTTrainer):
    """SFTTrainer with a learning rate and a schedule per block."""


# ---- a model and a tokenizer that need no network, in place of from_pretrained
TEXT = "one two three four five six seven eight nine ten"
words = ["<pad>", "<eos>", "<unk>", *TEXT.split()]
words_tokenizer = Tokenizer(
    models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
)
words_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words_tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
)
dataset = Dataset.from_dict({"text": [TEXT] * 64})

with tempfile.TemporaryDirectory() as folder:
    trainer = BlockwiseSFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=folder,
            learning_rate=5e-3,
            max_steps=20,
            per_device_train_batch_size=8,
            logging_steps=5,
            warmup_steps=2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()

for group in trainer.optimizer.param_groups:
    print(f"{group['block']:>4}  ratio {group['lr_ratio']:g}  {group['names'][0]}")
log = [entry for entry in trainer.state.log_history if "loss" in entry]
print("loss:", ", ".join(str(entry["loss"]) for entry in log))
assert {group["block"] for group in trainer.optimizer.param_groups} == {"qk", "vo", "ffn"}
assert float(log[-1]["loss"]) < float(log[0]["loss"])
