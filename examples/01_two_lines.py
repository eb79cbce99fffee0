"""The two lines, in a training loop of your own: split the fused weights, and give every block its learning rate."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from blockwise_lr import classify, cosine_schedule, param_groups, split_fused

STEPS, BASE_LR = 60, 1e-3

torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=2, n_head=2))

split_fused(model)  # GPT-2 makes queries, keys and values with one weight: give each its own parameter
groups = param_groups(model, lr=BASE_LR, weight_decay=0.1)  # the default ratios, one group a block

optimizer = torch.optim.AdamW(groups, lr=BASE_LR, betas=(0.9, 0.95), fused=True)
scheduler = cosine_schedule(optimizer, warmup_steps=6, total_steps=STEPS, floor=BASE_LR / 20)

for block, numel in classify(model).counts().items():
    print(f"{block:>5}: {numel:>7,} parameters")
for step in range(STEPS):
    tokens = torch.arange(32).repeat(8, 1) + torch.randint(96, (8, 1))  # something learnable: counting
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        rates = ", ".join(f"{g['block']} {g['lr']:.1e}" for g in optimizer.param_groups)
        print(f"step {step + 1:>3}  loss {loss.item():.3f}  {rates}")
assert loss.item() < 3
