"""accelerate: a loop on one process or many, with gradient accumulation and a schedule of torch's own."""

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from blockwise_lr import param_groups, scale_by_block, split_fused

STEPS, BASE_LR, ACCUMULATE = 60, 1e-3, 2

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=2, n_head=2))
split_fused(model)  # before param_groups and before accelerator.prepare
optimizer = torch.optim.AdamW(param_groups(model, lr=BASE_LR, weight_decay=0.1), lr=BASE_LR)
schedule = scale_by_block(
    OneCycleLR(optimizer, max_lr=BASE_LR, total_steps=STEPS * accelerator.num_processes)
)
tokens = torch.arange(32).repeat(8 * STEPS * ACCUMULATE, 1)
tokens = tokens + torch.randint(96, (len(tokens), 1))  # sequences that count upwards
batches = DataLoader(TensorDataset(tokens), batch_size=8, shuffle=True)

model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, batches, schedule)
losses = []
for (batch,) in batches:
    with accelerator.accumulate(model):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    losses.append(loss.item())
    if accelerator.is_main_process and len(losses) % 40 == 0:
        rates = ", ".join(f"{group['block']} {group['lr']:.1e}" for group in optimizer.param_groups)
        print(f"step {len(losses) // ACCUMULATE:>3}  loss {loss.item():.3f}  {rates}")

first = optimizer.param_groups[0]  # NORM
for group in optimizer.param_groups:
    assert abs(group["lr"] / first["lr"] - group["lr_ratio"] / first["lr_ratio"]) < 1e-6
assert losses[-1] < losses[0] - 1
