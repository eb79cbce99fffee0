"""What measuring and clipping by block, Adam-mini and AutoRatios cost, over a forward and backward pass or a step."""

from __future__ import annotations

from dataclasses import replace

import torch
from _measure import GPT2_SMALL, GPT2_TINY, Ratio, in_turns, ratio, timed
from sharpness_cost import against_a_step

from blockwise_lr import (
    AdamMini,
    AutoRatios,
    AutoRule,
    clip_grad_norm_by_block,
    cosine_schedule,
    measure_directional,
    param_groups,
    split_fused,
)
from blockwise_lr.train.build_model import build_model
from gpu.run_parts import Task


def measure(task: Task) -> None:
    """Measure GPT-2 small in fp32 on 4 windows of 1 024 tokens; write after each group of arms."""
    shape = replace(GPT2_TINY, context=32) if task.tiny else GPT2_SMALL
    model = split_fused(build_model(shape, seed=0)).to(task.device).train()
    ids = torch.randint(shape.vocab_size, (4, shape.context), device=task.device)
    task.record.add(settings={"shape": vars(shape), "batch": list(ids.shape)})
    seconds, ratios = against_a_step("GPT-2", model, ids, task.repeats)
    task.record.add(measurements={"GPT-2, s": seconds}, ratios=ratios)
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    for name, measured in {"steps": steps, "AutoRatios": auto_ratios, "directional": directional}.items():
        seconds, ratios = measured(model, ids, task.repeats)
        task.record.add(measurements={f"GPT-2, {name}, s": seconds}, ratios=ratios)


def steps(
    model: torch.nn.Module, ids: torch.Tensor, repeats: int
) -> tuple[dict[str, list[float]], list[Ratio]]:
    """Time clipping by block against torch's, and Adam-mini's step against AdamW's."""
    adamw = torch.optim.AdamW(param_groups(model, lr=1e-5), lr=1e-5, fused=True)
    mini = AdamMini(param_groups(model, lr=1e-5), lr=1e-5)
    parameters = list(model.parameters())
    model(input_ids=ids, labels=ids).loss.backward()
    arms = {
        "clipping": timed(lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0)),
        "clipping by block": timed(lambda: clip_grad_norm_by_block(model, 1.0, blocks=adamw.param_groups)),
        "AdamW": timed(adamw.step),
        "AdamMini": timed(mini.step),
    }
    in_turns(arms, 1)  # makes the optimizers' states
    seconds = in_turns(arms, repeats)
    return seconds, [
        ratio(seconds, "clipping by block", "clipping", what="GPT-2"),
        ratio(seconds, "AdamMini", "AdamW", what="GPT-2"),
    ]


def auto_ratios(
    model: torch.nn.Module, ids: torch.Tensor, repeats: int
) -> tuple[dict[str, list[float]], list[Ratio]]:
    """Time whole steps in which AutoRatios measures against those in which it does not."""
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-5), lr=1e-5, fused=True)
    schedule = cosine_schedule(optimizer, warmup_steps=1, total_steps=1000)
    rule = AutoRule(measurements=1000, start=0.0, stop=1.0)  # it measures at every step

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    def measuring_step() -> None:
        with AutoRatios(optimizer, schedule, rule) as auto:
            step()
        if not auto.cosines:
            raise RuntimeError("AutoRatios did not measure in this step: its rule has changed")

    step()
    arms = {"step": timed(step), "step with AutoRatios": timed(measuring_step)}
    in_turns(arms, 1)
    seconds = in_turns(arms, repeats)
    extra = [(b - a) / a for a, b in zip(seconds["step"], seconds["step with AutoRatios"])]
    return seconds, [Ratio("GPT-2: AutoRatios alone / step", extra)]


def directional(
    model: torch.nn.Module, ids: torch.Tensor, repeats: int
) -> tuple[dict[str, list[float]], list[Ratio]]:
    """Time `measure_directional` against a forward and backward pass."""
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-5), lr=1e-5, fused=True)
    batch = {"input_ids": ids, "labels": ids}

    def forward_and_backward() -> None:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()

    forward_and_backward()
    optimizer.step()
    optimizer.zero_grad()
    arms = {
        "forward and backward": timed(forward_and_backward),
        "measure_directional": timed(lambda: measure_directional(model, optimizer, batch)),
    }
    in_turns(arms, 1)
    seconds = in_turns(arms, min(repeats, 3))
    blocks = len(optimizer.param_groups)
    pair = ("measure_directional", "forward and backward")
    return seconds, [ratio(seconds, *pair, what="GPT-2", at_most=blocks + 4)]
