"""Extra memory of each measurement and of Adam-mini's step, in bytes a parameter, and of activations.

    python benchmarks/memory.py

The extra memory is the peak during the call minus what was allocated before it. On the CPU it comes from the
records of torch's allocator (profiler, profile_memory), so temporaries inside of kernels count. Each measurement runs
in a process of its own, and the peak of its resident memory is reported too. On a GPU it is the peak that torch's
allocator reports.

The model is a LLaMA of 105M parameters whose blocks have the shares of LLaMA-7B's. The batch is 32 tokens, so that
activations are negligible. The gradients of a training step are allocated before each call, so they do not count.
`activations` compares the forward and backward pass of a training step with `measure_sharpness`, on a narrow model with
gradient checkpointing and 2 048 tokens.
Needs about 5 GB. Writes results/memory-<date>.json.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import platform
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _measure import Ratio, argument_parser, finish
from torch.profiler import ProfilerActivity, profile

from blockwise_lr import (
    AdamMini,
    AutoRatios,
    AutoRule,
    cosine_schedule,
    measure_directional,
    measure_sharpness,
    param_groups,
)
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig

WIDE = ModelConfig("llama", 1024, 8, 8, ffn_size=2752, vocab_size=2048, context=64)
WIDE_TINY = ModelConfig("llama", 64, 2, 2, ffn_size=172, vocab_size=256, context=64)
DEEP = ModelConfig("llama", 128, 8, 2, vocab_size=512, context=512)
DEEP_TINY = ModelConfig("llama", 32, 4, 2, vocab_size=64, context=128)
TOKENS = 32


class Extra(NamedTuple):
    """Peak of a call above what was there before it, in bytes."""

    allocated: float
    resident: float | None
    """Of the process; None where it cannot be known: on a GPU, or if the system is not Linux."""


@dataclass(frozen=True)
class Case:
    """One call whose memory is measured, and the largest number of bytes a parameter that it should take."""

    call: str
    dtype: torch.dtype
    at_most: float

    @property
    def name(self) -> str:
        return f"{self.call}, {'fp32' if self.dtype == torch.float32 else 'bf16'}"


CASES = (
    Case("measure_directional", torch.float32, 5.0),
    Case("measure_directional", torch.bfloat16, 5.0),
    Case("AutoRatios", torch.float32, 1.0),
    Case("AdamMini.step", torch.float32, 0.5),
    Case("AdamMini.step", torch.bfloat16, 0.5),
    Case("measure_sharpness", torch.float32, 1.0),
)


def main() -> None:
    """Measure every case and write the result."""
    parser = argument_parser(__doc__, repeats=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    measurements, ratios = measure_all(arguments.device, quick=arguments.quick, isolated=True)
    settings = {"shapes": shapes(arguments.quick), "parameters": count(arguments.quick), "tokens": TOKENS}
    finish(__file__, arguments, settings=settings, measurements=measurements, ratios=ratios)


def shapes(quick: bool) -> dict[str, Any]:
    """Return the sizes of both models."""
    return {
        "bytes a parameter": vars(WIDE_TINY if quick else WIDE),
        "activations": vars(DEEP_TINY if quick else DEEP),
    }


def count(quick: bool) -> int:
    """Return the number of parameters of the model that bytes a parameter are measured on."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(WIDE_TINY if quick else WIDE, seed=0).parameters())


def measure_all(
    device: str,
    *,
    quick: bool,
    isolated: bool,
    report: Callable[[dict[str, Any], list[Ratio]], None] = lambda measurements, ratios: None,
) -> tuple[dict[str, Any], list[Ratio]]:
    """Measure all cases.

    Args:
        device: "cpu" or "cuda".
        quick: use tiny models.
        isolated: run each case on the CPU in a process of its own, to read its resident memory.
        report: called after each case with what is known by then.
    """
    parameters = count(quick)
    extra: dict[str, list[float]] = {}
    resident: dict[str, list[float]] = {}
    measurements = {"extra bytes a parameter": extra, "resident bytes a parameter": resident}
    ratios: list[Ratio] = []
    for case in CASES:
        found: Extra = run(of_case, isolated and device == "cpu", case, device, quick)
        extra[case.name] = [found.allocated / parameters]
        if isolated and found.resident is not None:
            resident[case.name] = [found.resident / parameters]
        ratios.append(Ratio(f"{case.name}: extra bytes / parameters", extra[case.name], at_most=case.at_most))
        report(measurements, ratios)
    step, sharpness = run(activations, isolated and device == "cpu", device, quick)
    measurements["activations, MB"] = {
        "training step": [step.allocated / 1e6],
        "measure_sharpness": [sharpness.allocated / 1e6],
    }
    ratios.append(
        Ratio(
            "activations with checkpointing: measure_sharpness / training step",
            [sharpness.allocated / step.allocated],
            at_most=1.0,
        )
    )
    report(measurements, ratios)
    return measurements, ratios


def run(function: Callable[..., Any], isolated: bool, *arguments: Any) -> Any:
    """Call a function, in a forked process if `isolated`. The fork has the imports, and no tensors yet."""
    if not isolated:
        return function(*arguments)
    with multiprocessing.get_context("fork").Pool(1, return_freed_memory) as pool:
        return pool.apply(function, arguments)


def return_freed_memory() -> None:
    """Let glibc's malloc return freed tensors to the system, or resident memory would count its free lists."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD


def of_case(case: Case, device: str, quick: bool) -> Extra:
    """Return the extra memory of one call."""
    with known_sizes(device):
        work, auto = prepared(case, device, quick)
    found = extra_memory(work, device)
    if auto is not None and not auto.cosines:
        raise RuntimeError("AutoRatios did not measure in this step: its rule has changed")
    return found


def prepared(case: Case, device: str, quick: bool) -> tuple[Callable[[], Any], AutoRatios | None]:
    """Return the call of a case, on a model that has trained for one step, and the AutoRatios of that case."""
    torch.manual_seed(0)
    shape = WIDE_TINY if quick else WIDE
    model = build_model(shape, seed=0).to(device, case.dtype).train()
    ids = torch.randint(shape.vocab_size, (1, TOKENS), device=device)
    batch = {"input_ids": ids, "labels": ids}

    def gradients() -> None:
        model(**batch).loss.backward()

    groups = param_groups(model, lr=1e-4)
    optimizer: torch.optim.Optimizer
    if case.call == "AdamMini.step":
        optimizer = AdamMini(groups, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)  # its own step allocates nothing
    auto = None
    if case.call == "AutoRatios":
        rule = AutoRule(measurements=1000, start=0.0, stop=1.0)
        schedule = cosine_schedule(optimizer, warmup_steps=1, total_steps=1000)  # a measurement each step
        auto = AutoRatios(optimizer, schedule, rule)
    gradients()
    optimizer.step()
    if auto is not None:
        schedule.step()
    if case.call in ("AutoRatios", "AdamMini.step"):
        return optimizer.step, auto
    if case.call == "measure_sharpness":
        return lambda: measure_sharpness(model, batch), None
    return lambda: measure_directional(model, optimizer, batch), None


def activations(device: str, quick: bool) -> tuple[Extra, Extra]:
    """Return what forward and backward pass and `measure_sharpness` take, with checkpointing."""
    torch.manual_seed(0)
    shape = DEEP_TINY if quick else DEEP
    with known_sizes(device):
        model = build_model(shape, seed=0).to(device).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = torch.randint(shape.vocab_size, (4, shape.context), device=device)
        batch = {"input_ids": ids, "labels": ids}

        def forward_and_backward() -> None:
            model(**batch).loss.backward()

        forward_and_backward()  # allocates the gradients
    step = extra_memory(forward_and_backward, device)
    return step, extra_memory(lambda: measure_sharpness(model, batch), device)


def known_sizes(device: str) -> AbstractContextManager[Any]:
    """Return a context in which the profiler learns the sizes of tensors, or it would not count that they are freed."""
    return nullcontext() if device == "cuda" else memory_records()


def memory_records() -> profile:
    """Return a profiler that records what the CPU's allocator does."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def extra_memory(work: Callable[[], Any], device: str) -> Extra:
    """Return the peak memory of a call above what is allocated before it.

    On the CPU, that a tensor is freed counts if it was allocated in the call or under :func:`known_sizes`.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return Extra(torch.cuda.max_memory_allocated() - before, None)
    before = resident_bytes("VmRSS", reset=True)
    with memory_records() as records:
        work()
    after = resident_bytes("VmHWM")
    events = [e for e in records.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()  # below 0 where memory is freed
        peak = max(peak, now)
    return Extra(peak, None if before is None or after is None else after - before)


def resident_bytes(field: str, *, reset: bool = False) -> int | None:
    """Return VmRSS or VmHWM, the resident memory and its peak; None if the system does not tell.

    Args:
        field: "VmRSS" or "VmHWM".
        reset: return freed memory to the system first, and let the peak begin here.
    """
    if sys.platform != "linux":
        return None
    if reset:
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
