"""DeepSpeed: train a small LLaMA with the groups of blocks.json, without blockwise-lr."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

STEPS = 200


def groups_from_json(model, path, lr=None):
    """Return the parameter groups that blockwise-lr export wrote for this model.

    `lr` is the base learning rate. The default is that of the file, which has one if it was exported with --lr.
    """
    parameters = dict(model.named_parameters())
    content = json.loads(Path(path).read_text())
    base = content["lr"] if lr is None else lr
    if base is None:
        raise ValueError(f"{path} has no learning rate: give groups_from_json one, such as lr=6e-4")
    groups = content["groups"]
    for group in groups:
        group["params"] = [parameters[name] for name in group.pop("parameters")]
        group["lr"] = group["lr_ratio"] * base
    return groups


def build():
    """Return the model that the groups were exported for."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4
        )
    )


def main():
    import deepspeed

    model = build()
    groups = groups_from_json(model, "blocks.json")
    engine, _, _, schedule = deepspeed.initialize(
        model=model,
        model_parameters=groups,
        # A schedule that multiplies each group's own rate. WarmupLR would set all groups to one.
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 20)
        ),
        config={
            "train_micro_batch_size_per_gpu": 8,
            "optimizer": {"type": "AdamW", "params": {"lr": groups[0]["lr"], "betas": [0.9, 0.95]}},
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 1},
        },
    )
    text = torch.randint(256, (8, 128), device=engine.device)  # your tokens
    for step in range(STEPS):
        loss = engine(input_ids=text, labels=text).loss
        engine.backward(loss)
        engine.step()
        if step % 20 == 0:
            print(step, loss.item(), schedule.get_last_lr())


if __name__ == "__main__":
    main()
