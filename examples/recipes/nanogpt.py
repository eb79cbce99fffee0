"""nanoGPT's training loop, which computes the learning rate itself and assigns it at every step."""

import math

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from blockwise_lr import param_groups, set_lr, split_fused

# ---- settings, under the names of nanoGPT's train.py
learning_rate, min_lr = 1e-3, 1e-4
warmup_iters, max_iters, lr_decay_iters = 10, 100, 100
batch_size, block_size, gradient_accumulation_steps = 8, 32, 2
weight_decay, beta1, beta2, grad_clip = 0.1, 0.9, 0.95, 1.0


def get_batch() -> torch.Tensor:
    """Sequences that count upwards, in place of train.bin."""
    return torch.arange(block_size).repeat(batch_size, 1) + torch.randint(96, (batch_size, 1))


def get_lr(it: int) -> float:
    """The base learning rate: nanoGPT's linear warm-up, then cosine decay."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    ratio = min((it - warmup_iters) / (lr_decay_iters - warmup_iters), 1.0)
    return min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


torch.manual_seed(1337)
model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=block_size, n_embd=64, n_layer=2, n_head=2))
split_fused(model)  # c_attn holds queries, keys and values, which get different rates

# In place of model.configure_optimizers(...)
groups = param_groups(model, lr=learning_rate, weight_decay=weight_decay)
optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)

first = None
for it in range(max_iters):
    # In place of: for param_group in optimizer.param_groups: param_group["lr"] = lr
    lr = get_lr(it)
    set_lr(optimizer, lr)
    for _ in range(gradient_accumulation_steps):
        x = get_batch()
        loss = model(input_ids=x, labels=x).loss
        (loss / gradient_accumulation_steps).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    first = loss.item() if first is None else first
    if it % 20 == 19:
        rates = ", ".join(f"{group['block']} {group['lr']:.1e}" for group in optimizer.param_groups)
        print(f"iter {it + 1:>3}  loss {loss.item():.3f}  base {lr:.1e}: {rates}")

for group in optimizer.param_groups:  # the ratios held to the end
    assert math.isclose(group["lr"], lr * group["lr_ratio"])
assert loss.item() < first - 1
