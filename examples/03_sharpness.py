"""How sharp is each block, and how does that change while a model trains?"""

import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from blockwise_lr import measure_sharpness
from blockwise_lr.sharpness.monitor import SharpnessMonitor, read_reports

STEPS, ROWS, LENGTH = 60, 8, 32


def batch(seed: int) -> dict[str, torch.Tensor]:
    """Something learnable: counting."""
    start = torch.randint(96, (ROWS, 1), generator=torch.Generator().manual_seed(seed))
    tokens = torch.arange(LENGTH) + start
    return {"input_ids": tokens, "labels": tokens}


torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=2))
held_out = [batch(10_000 + i) for i in range(4)]

report = measure_sharpness(model, held_out)  # any model; a fused QKV weight need not be split
for block, found in report.items():
    print(f"{block.value:>5}: {found.mean:.2e} +- {found.stderr:.0e}")

optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
path = Path(tempfile.mkdtemp()) / "sharpness.jsonl"
fisher = SharpnessMonitor(model, held_out, every=20, path=path)
empirical = SharpnessMonitor(  # off the gradients of training itself: free, and biased
    model, every=20, path=path, estimator="empirical", tokens_per_step=ROWS * (LENGTH - 1)
)
for step in range(STEPS):
    fisher.step(step)  # the model after `step` updates
    model(**batch(step)).loss.backward()
    empirical.gradients(step)  # before they are clipped
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
fisher.step(STEPS)

for report in read_reports(path):
    shown = ", ".join(f"{block.value} {found.mean:.1e}" for block, found in report.items())
    print(f"step {report.step:>2} {report.estimator:>9}: {shown}")
