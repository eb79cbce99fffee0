"""The same in transformers' Trainer: BlockwiseTrainer brings the optimizer, the schedule and the log of every block."""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from blockwise_lr.integrations.transformers import BlockwiseTrainer


class Counting(Dataset):
    """Sequences that count upwards, something a model can learn in seconds."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(32) + index % 96
        return {"input_ids": tokens, "labels": tokens}


torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
)  # nothing fused here, so nothing to split
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=60, per_device_train_batch_size=8, learning_rate=1e-3, weight_decay=0.1,
        warmup_steps=6, logging_steps=20, report_to="none", use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = BlockwiseTrainer(
        model,
        arguments,
        train_dataset=Counting(),
        ratios={"emb": 10, "qk": 8, "ffn": 6, "vo": 4},
        schedule="cosine",  # the paper's; "trainer" takes lr_scheduler_type
    )
    trainer.train()
assert trainer.state.log_history[-2]["loss"] < 3
