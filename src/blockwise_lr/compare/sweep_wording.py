"""The sentences about a sweep over ratios, in its JSON file, in the report and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockwise_lr.compare.ratio_sweeps import TOLERANCE
from blockwise_lr.compare.wording import ONE_SEED, format_interval, format_signed
from blockwise_lr.optim.block_values import digits

_SIGNS = {"exact": "", "at_most": "≤ ", "at_least": "≥ "}


def answer(content: Mapping[str, Any]) -> list[str]:
    """Return the first sentences of the report."""
    own = _robustness(content) if content["kind"] == "robustness" else _ablation(content)
    one = [ONE_SEED] if len(content["seeds"]) == 1 else []
    return [*_gain(content), *own, *one]


def how_tuned(content: Mapping[str, Any]) -> str:
    """Describe how the base learning rates of all arms were chosen."""
    centre, baseline = content["centre"], content["baseline"]["arm"]
    others = f"all other arms have the setting of {centre}"
    if content["base_lrs"] is None:
        before = content["tuned_arms"]
        known = (
            f"tuned beforehand for {' and '.join(before)}, as part of the preset" if before else "not tuned"
        )
        return f"{known}; {others}" if baseline in before else f"{known}; all arms have one setting"
    grid = ", ".join(f"{lr:g}" for lr in content["base_lrs"])
    if content["warmups"] is not None:
        grid += f" with warm-ups of {', '.join(f'{warmup:.0%}' for warmup in content['warmups'])}"
    if content["refined"]:
        grid += ", then a factor of √2 to either side of the best,"
    chosen = f"over {grid} with seed {content['seeds'][0]}, chosen by the tune loss"
    names = centre if centre == baseline else f"{centre} and {baseline}"
    if content["tuned"]:
        return f"every arm tuned {chosen}"
    return f"{names} each tuned {chosen}; {others}"


def format_edge(width: Mapping[str, Any], side: str) -> str:
    """Format one edge of a valley, as a factor of the ratio: "0.71", "≥ 4"."""
    return f"{_SIGNS[width[f'{side}_bound']]}{width[side]:.2g}"


def format_edges_by_seed(width: Mapping[str, Any], side: str) -> str:
    """Format the smallest and the largest edge of a valley over seeds; a dash for one seed."""
    edges = sorted(width["per_seed"], key=lambda each: float(each[side]))
    if len(edges) < 2:
        return "–"
    low, high = format_edge(edges[0], side), format_edge(edges[-1], side)
    return low if low == high else f"{low} to {high}"


def _gain(content: Mapping[str, Any]) -> list[str]:
    baseline, centre = content["baseline"], content["centre"]
    if baseline["arm"] == centre:
        return []
    ratios = f"The ratios {content['ratios']}"
    uniform = "tuned uniform" if baseline["arm"] in content["tuned_arms"] else "uniform"
    gain, steps = baseline["gain"], f"{content['steps']:,} steps"
    if gain["mean"] is None:
        return [f"{ratios} cannot be compared with {uniform}: a run diverged."]
    side = "below" if gain["mean"] > 0 else "above"
    interval = "with one seed"
    if len(content["seeds"]) > 1:
        found = "no interval" if gain["ci95"] is None else f"95 % CI {format_interval(gain['ci95'], 3, True)}"
        interval = f"{found}, {len(content['seeds'])} seeds"
    if gain["significant"] is False:
        return [
            f"{ratios} and {uniform} cannot be told apart after {steps}: {format_signed(gain['mean'], 3)} nats "
            f"({interval})."
        ]
    return [f"{ratios} end {abs(gain['mean']):.3f} nats {side} {uniform} after {steps} ({interval})."]


def _robustness(content: Mapping[str, Any]) -> list[str]:
    scaled = [point for point in content["points"] if point["curve"]]
    alone = [point for point in scaled if point["curve"] in content["widths"] and " " not in point["curve"]]
    found = []
    if content["points"][0]["loss"] is None:
        found.append("A run with the unscaled ratios diverged, so what scaling changes is not known.")
    if failed := [point["arm"] for point in alone if point["loss"] is None]:
        found.append(f"Of the ratios that were scaled alone, {', '.join(failed)} diverged.")
    elif content["points"][0]["loss"] is not None:
        worst = max(alone, key=lambda point: abs(point["cost"]["mean"]))
        found.append(
            f"Scaled alone, the ratio that matters most is that of {worst['curve'].upper()}: times "
            f"{digits(worst['position'])}, it changes the loss by {format_signed(worst['cost']['mean'], 3)} nats."
        )
    free = [
        curve.upper()
        for curve, width in content["widths"].items()
        if " " not in curve and {width["low_bound"], width["high_bound"]} == {"at_most", "at_least"}
        if all(p["cost"]["mean"] is not None for p in alone if p["curve"] == curve)
    ]
    if free:
        lowest, highest = min(p["position"] for p in alone), max(p["position"] for p in alone)
        found.append(
            f"The loss rises by less than {TOLERANCE:g} nats over the whole range, times {digits(lowest)} to "
            f"{digits(highest)}, for {', '.join(free)}."
        )
    uniform = content["baseline"]["loss"]
    if uniform is not None and content["baseline"]["arm"] != content["centre"]:
        below = sum(point["loss"] is not None and point["loss"] < uniform for point in scaled)
        found.append(f"{below} of the {len(scaled)} scaled arms still end below uniform.")
    return found


def _ablation(content: Mapping[str, Any]) -> list[str]:
    found = []
    for order, blocks in content["worth"].items():
        known = {block: each["mean"] for block, each in blocks.items() if each["mean"] is not None}
        if not known:
            continue
        first = next(iter(blocks))
        best = max(known, key=lambda block: float(known[block]))
        if len(blocks) == 1:
            found.append(f"{best.upper()} alone wins {format_signed(known[best], 3)} nats.")
            continue
        given = "alone" if best == first else "given the blocks before it"
        some = "" if len(known) == len(blocks) else ", of those without a run that diverged"
        found.append(
            f"Switched on {order}, {best.upper()} wins most{some}: {format_signed(known[best], 3)} nats {given}."
        )
    return found


def blocks_in_order(worth: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """Return the blocks of an ablation, in the first of its orders."""
    return list(next(iter(worth.values())))
