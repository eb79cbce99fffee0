"""The sentences about a fit over sizes, in scaling.json, in the report and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockwise_lr.compare.wording import ONE_SEED, format_interval, format_signed

_MISFIT = 2.0
"""How many times the noise of a mean loss the residuals of a fit may be."""


def answer(content: Mapping[str, Any]) -> list[str]:
    """Return the first sentences of the report: for each arm the gaps, their trend, and the factor of parameters."""
    found = []
    for comparison in content["comparisons"]:
        found += [_gaps(comparison), _trend(comparison), _factor(comparison)]
    most = max(len(next(iter(size["arms"].values()))["losses"]) for size in content["sizes"])
    return [*filter(None, found), *([ONE_SEED] if most == 1 else [])]


def size_key(content: Mapping[str, Any]) -> str:
    """Return the key of the counted parameters in the entries of "sizes"."""
    return "parameters" if content["parameters"] == "all" else "non_embedding"


def format_count(parameters: float) -> str:
    """Format a number of parameters with a unit.

    Example:
        >>> format_count(148_520), format_count(1_836_160), format_count(2.5e9)
        ('149K', '1.84M', '2.5B')
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= 0.9995 * size:
            return f"{parameters / size:.3g}{unit}"
    return f"{parameters:g}"


def format_number(value: float | None) -> str:
    """Format a number of a fit with three digits; None stands for infinity."""
    if value is None:
        return "∞"
    return f"{value:.2e}".replace("e+0", "e").replace("e+", "e") if value >= 1e4 else f"{value:.3g}"


def format_range(ci95: Sequence[float | None]) -> str:
    """Format an interval of a fit."""
    low, high = map(format_number, ci95)
    return f"{low} to {high}"


def format_factor(value: float | None) -> str:
    """Format a factor of parameters: "1.72×"; None stands for a loss below the law's floor."""
    return "∞" if value is None else f"{value:.2f}×"


def largest_inside(comparison: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the largest size whose factor is read inside the range of sizes; None if there is none."""
    inside: list[Mapping[str, Any]] = [size for size in comparison["sizes"] if not size["factor"]["outside"]]
    return inside[-1] if inside else None


def _gaps(comparison: Mapping[str, Any]) -> str:
    first, last = comparison["sizes"][0], comparison["sizes"][-1]
    gaps = [size["loss_gap"]["mean"] for size in comparison["sizes"]]
    arm, against = comparison["arm"], comparison["against"]
    where = f"with {format_count(first['parameters'])} and {{}} with {format_count(last['parameters'])} parameters"
    if min(gaps) > 0 or max(gaps) < 0:
        side = "below" if gaps[0] > 0 else "above"
        return (
            f"{arm} ends {side} {against} at every size: by {abs(gaps[0]):.3f} nats "
            f"{where.format(f'{abs(gaps[-1]):.3f}')}."
        )
    below = sum(gap > 0 for gap in gaps)
    return (
        f"{arm} ends below {against} at {below} of {len(gaps)} sizes; the gap is {format_signed(gaps[0], 3)} nats "
        f"{where.format(format_signed(gaps[-1], 3))}."
    )


def _trend(comparison: Mapping[str, Any]) -> str:
    trend = comparison["gap_per_doubling"]
    low, high = trend["ci95"]
    interval = f"95 % CI {format_interval(trend['ci95'], 3, signed=True)}"
    change = f"{format_signed(trend['mean'], 3)} nats for every doubling of the parameters ({interval})"
    if low <= 0 <= high:
        return f"No trend of the gap with size can be told: {change}."
    # The gap is signed: where the arm is behind at every size, a gap that rises is a smaller one.
    towards = f"{'in favour of' if low > 0 else 'against'} {comparison['arm']}"
    gaps = [size["loss_gap"]["mean"] for size in comparison["sizes"]]
    if max(gaps) < 0:
        return f"The gap {'shrinks' if low > 0 else 'grows'} with size, {towards}: {change}."
    if min(gaps) <= 0:
        return f"The gap moves with size, {towards}: {change}."
    return f"The gap {'grows' if low > 0 else 'shrinks'} with size: {change}."


def _factor(comparison: Mapping[str, Any]) -> str | None:
    size = largest_inside(comparison)
    if size is None:
        return None
    factor = size["factor"]
    interval = " to ".join("∞" if end is None else f"{end:.2f}" for end in factor["ci95"])
    return (
        f"For the loss of {comparison['arm']} with {format_count(size['parameters'])} parameters, "
        f"{comparison['against']} needs {factor['value']:.2f} times as many (95 % CI {interval})."
    )


def warnings_about(content: Mapping[str, Any]) -> list[str]:
    """Return what a fit over these sizes cannot tell, one sentence each."""
    sizes, fits = content["sizes"], content["fits"]
    free = len(sizes) - 3
    found: list[str | None] = [
        f"{len(sizes)} sizes determine three numbers per arm, which leaves {free} degree{'s' * (free > 1)} of freedom: "
        "E, A and alpha can trade off against each other, so read them with their intervals, and do not extrapolate.",
        _span(content),
        _budget(sizes),
    ]
    for arm, fit in fits.items():
        if "A" in fit["at_bound"]:
            found.append(f"The loss of {arm} does not fall with size; its law has no meaning.")
        elif fit["at_bound"]:
            names = " and ".join(fit["at_bound"])
            found.append(f"For {arm}, {names} is at the edge of its range: these sizes do not determine it.")
    if content["parameters"] != "all":
        found.append("Sizes are counted without the parameters of embeddings and output head.")
    found += [_misfit(content, arm) for arm in fits]
    return [*filter(None, [*found, _untuned(content), _different_rules(sizes), _no_seeds(content)])]


def _span(content: Mapping[str, Any]) -> str:
    key = size_key(content)
    low, high = content["sizes"][0][key], content["sizes"][-1][key]
    return (
        f"The sizes span a factor of {high / low:.3g}. E is the loss of an infinitely large model: a guess far "
        "outside of them."
    )


def _budget(sizes: Sequence[Mapping[str, Any]]) -> str:
    tokens = [size["tokens"] for size in sizes]
    if len(set(tokens)) == 1:
        return (
            f"Every size was trained on {format_count(tokens[0])} tokens. The law holds for this budget, and not for "
            "sizes that are trained for longer the larger they are."
        )
    return f"The sizes were trained on {format_count(min(tokens))} to {format_count(max(tokens))} tokens."


def _misfit(content: Mapping[str, Any], arm: str) -> str | None:
    if content["noise"]["source"] != "seeds":
        return None
    seeds = [len(size["arms"][arm]["losses"]) for size in content["sizes"]]
    # A fit of k sizes leaves k - 3 of k residuals free.
    expected = content["noise"]["sd"][arm] * (sum(1 / s for s in seeds) / len(seeds)) ** 0.5
    expected *= ((len(seeds) - 3) / len(seeds)) ** 0.5
    rms = content["fits"][arm]["rms"]
    if rms <= _MISFIT * expected:
        return None
    return (
        f"The law misses the losses of {arm} by {rms:.4f} nats (root mean square), more than the noise of the runs "
        f"explains ({expected:.4f}): the sizes do not follow one power law, and the intervals are too narrow."
    )


def _untuned(content: Mapping[str, Any]) -> str | None:
    sizes, key = content["sizes"], size_key(content)
    untuned = [
        f"{arm} ({format_count(size[key])})"
        for size in sizes
        for arm, found in size["arms"].items()
        if found["tuned"] is False
    ]
    if untuned:
        return (
            f"The base learning rate was not tuned, or is at the edge of its grid, for {', '.join(untuned)}."
        )
    if any(found["tuned"] is None for size in sizes for found in size["arms"].values()):
        return "Single runs do not tell whether their base learning rate was tuned for their size."
    return None


def _different_rules(sizes: Sequence[Mapping[str, Any]]) -> str | None:
    different = [arm for arm in sizes[0]["arms"] if len({size["arms"][arm]["rule"] for size in sizes}) > 1]
    if not different:
        return None
    return f"The optimizer or the ratios of {', '.join(different)} differ between sizes (see the table of sizes)."


def _no_seeds(content: Mapping[str, Any]) -> str | None:
    if content["noise"]["source"] == "seeds":
        return None
    degrees = content["noise"]["degrees"]
    return (
        f"No size has two seeds. The intervals come from what the fits leave, with {degrees} "
        f"degree{'s' * (degrees > 1)} of freedom."
    )
