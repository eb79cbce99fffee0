"""transformers' Trainer: BlockwiseTrainer takes Trainer's own arguments and logs the learning rate of every block."""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from blockwise_lr import split_fused
from blockwise_lr.integrations.transformers import BlockwiseTrainer


class Counting(Dataset):
    """Sequences that count upwards, something a model can learn in seconds."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(32) + index % 96
        return {"input_ids": tokens, "labels": tokens}


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
model = split_fused(LlamaForCausalLM(config))  # LLaMA has no fused weights: nothing changes

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=60,
        per_device_train_batch_size=8,
        learning_rate=1e-3,  # the rate that you tuned for one rate
        weight_decay=0.1,
        adam_beta2=0.95,
        warmup_steps=6,
        logging_steps=20,
        save_steps=30,
        report_to="none",
        use_cpu=True,
    )
    trainer = BlockwiseTrainer(
        model=model,
        args=arguments,
        train_dataset=Counting(),
        ratios="half",  # the default; or "measured" (for short runs), "paper", "uniform", a dict, a report
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    # The checkpoint resumes with the same rates.
    BlockwiseTrainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=Counting()).train(
        resume_from_checkpoint=f"{folder}/checkpoint-30"
    )

for entry in log:
    print({name: value for name, value in entry.items() if name == "loss" or name.startswith("lr/")})
assert "lr/qk" in log[0]
assert float(log[-1]["loss"]) < float(log[0]["loss"])
