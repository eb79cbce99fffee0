"""timm: a vision Transformer, whose fused qkv weights are split, and the schedule of timm's own."""

import timm
import torch
from timm.scheduler import CosineLRScheduler

from blockwise_lr import classify, param_groups, split_fused

STEPS, BASE_LR = 30, 1e-3

torch.manual_seed(0)
model = timm.create_model(
    "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=4
)
split_fused(model)  # before the optimizer
for block, numel in classify(model).counts().items():
    print(f"{block:>5}: {numel:>7,} parameters")

optimizer = torch.optim.AdamW(param_groups(model, lr=BASE_LR, weight_decay=0.05), lr=BASE_LR)
# timm's schedules scale the rate that each group began with, so the ratios hold.
schedule = CosineLRScheduler(optimizer, t_initial=STEPS, lr_min=0, warmup_t=3, t_in_epochs=False)

labels = torch.arange(16) % 4
images = torch.randn(16, 3, 32, 32) * 0.1 + labels.view(-1, 1, 1, 1)  # a class is a brightness
losses = []
for step in range(STEPS):
    schedule.step_update(step)
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

for group in optimizer.param_groups:
    print(f"{group['block']:>5}  ratio {group['lr_ratio']:g}  learning rate {group['lr']:.1e}")
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0]
