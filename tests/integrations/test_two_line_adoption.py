"""The two lines in nanoGPT's loop and in transformers' Trainer, with the learning rate that the user already has."""

from __future__ import annotations

import math
from functools import cache, partial

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from blockwise_lr import DEFAULT_RATIOS, Block, param_groups, set_lr
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.sources import open_source
from blockwise_lr.integrations.transformers import BlockwiseTrainer
from support import tiny_models

VOCAB, CONTEXT, BATCH, STEPS = 1024, 64, 16, 100
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
"""Learning rates over which plain AdamW is tuned."""

gpt2 = partial(tiny_models.gpt2, vocab_size=VOCAB, n_positions=CONTEXT, n_embd=64, dropout=0.0, split=True)
llama = partial(
    tiny_models.llama,
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=256,
    max_position_embeddings=CONTEXT,
)


@cache
def tokens() -> tuple[Tensor, Tensor]:
    """Windows to train on, each used once, and windows to validate on: State of the Union addresses."""
    text = "".join(open_source(DataConfig()).documents())[:2_000_000]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=VOCAB, show_progress=False)
    windows = torch.tensor(tokenizer.encode(text).ids)
    windows = windows[: len(windows) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return windows[: STEPS * BATCH], windows[-256:]


class Windows(Dataset):
    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = tokens()[0][index]
        return {"input_ids": window, "labels": window}


@torch.no_grad()
def validation_loss(model: nn.Module) -> float:
    windows = tokens()[1]
    return float(model.eval()(input_ids=windows, labels=windows).loss)


def rate_at(step: int, learning_rate: float) -> float:
    """nanoGPT's schedule: linear warm-up, then cosine to a tenth."""
    warmup = STEPS // 10
    if step < warmup:
        return learning_rate * (step + 1) / (warmup + 1)
    share = (step - warmup) / (STEPS - warmup)
    return learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def nanogpt_loop(learning_rate: float, *, blockwise: bool, steps: int = STEPS) -> tuple[float, list[dict]]:
    """nanoGPT's loop, unchanged or with its two lines changed; the validation loss and the last groups."""
    model = gpt2()
    options = {"lr": learning_rate, "betas": (0.9, 0.95), "weight_decay": 0.1}
    groups = param_groups(model, learning_rate) if blockwise else model.parameters()
    optimizer = torch.optim.AdamW(groups, **options)
    for step, batch in zip(range(steps), tokens()[0].split(BATCH)):
        rate = rate_at(step, learning_rate)
        if blockwise:
            set_lr(optimizer, rate)
        else:
            for group in optimizer.param_groups:
                group["lr"] = rate
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return validation_loss(model), optimizer.param_groups


def trainer_run(kind: type[Trainer], folder, learning_rate: float, steps: int = STEPS, **options) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=learning_rate,
        warmup_steps=STEPS // 10, weight_decay=0.1, adam_beta2=0.95, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = kind(llama(), arguments, train_dataset=Windows(), **options)
    trainer.train()
    return trainer


def test_in_nanogpts_loop_the_rate_stays_and_the_ratios_are_the_default() -> None:
    _, groups = nanogpt_loop(6e-4, blockwise=True, steps=3)
    for group in groups:
        assert group["lr"] == pytest.approx(rate_at(2, 6e-4) * DEFAULT_RATIOS.get(Block(group["block"]), 1.0))


def test_in_trainer_the_rate_stays_and_the_ratios_are_the_default(tmp_path) -> None:
    plain = trainer_run(Trainer, tmp_path / "plain", 6e-4, steps=3)
    ours = trainer_run(BlockwiseTrainer, tmp_path / "ours", 6e-4, steps=3, schedule="trainer")
    before, after = ([row for row in each.state.log_history if "loss" in row] for each in (plain, ours))
    for step, row in enumerate(after):
        # Trainer logs the rate after the step, BlockwiseTrainer the one that the step used.
        base = 6e-4 * step / (STEPS // 10)
        assert row["learning_rate"] == pytest.approx(base)
        assert before[step]["learning_rate"] == pytest.approx(base if step else before[0]["learning_rate"])
        for block, ratio in DEFAULT_RATIOS.items():
            assert row[f"lr/{block.value}"] == pytest.approx(ratio * base)


@pytest.mark.slow
def test_in_nanogpts_loop_the_default_beats_plain_adamw_at_its_own_best_rate() -> None:
    losses = [nanogpt_loop(rate, blockwise=False)[0] for rate in RATES]
    tuned = RATES[losses.index(min(losses))]
    assert nanogpt_loop(tuned, blockwise=True)[0] < min(losses) - 0.1


@pytest.mark.slow
def test_in_trainer_the_default_beats_plain_adamw_at_its_own_best_rate(tmp_path) -> None:
    losses = [validation_loss(trainer_run(Trainer, tmp_path / str(rate), rate).model) for rate in RATES]
    tuned = RATES[losses.index(min(losses))]
    ours = trainer_run(BlockwiseTrainer, tmp_path / "ours", tuned, schedule="trainer")
    assert validation_loss(ours.model) < min(losses) - 0.1
