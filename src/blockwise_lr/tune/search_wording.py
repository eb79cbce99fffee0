"""The sentences about a search, and the lines to paste."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from blockwise_lr.blocks import Block
from blockwise_lr.compare.wording import format_interval, format_p_value, format_signed
from blockwise_lr.optim.block_values import digits, format_pairs
from blockwise_lr.optim.decay import WEIGHT_DECAY, resolve_decay
from blockwise_lr.train.settings import OptimSettings
from blockwise_lr.tune.search_plan import SearchPlan
from blockwise_lr.tune.space import Point
from blockwise_lr.tune.valley import ALLOWED, REACH

RATIOS = "ratios.json"
_OWN_FLAGS = {"trials", "sampler", "proxy", "workers", "repeats", "out", "early-end", "no-early-end"}
_FOUND_FLAGS = {"ratios", "base-lr", "warmup-fraction", "warmup-steps", "steps", "seed", "re-measure"}


def answer(content: Mapping[str, Any]) -> list[str]:
    """Return the first sentences of the report: the gain, the ratios, and what the trials decide."""
    return [_gain(content), _ratios(content), _decisions(content)]


def _gain(content: Mapping[str, Any]) -> str:
    gain, seeds = content["gain"], len(content["seeds"])
    steps = f"after {content['steps']:,} steps"
    if _is_uniform(content):
        return f"No ratios that were tried beat the tuned uniform learning rate {steps}."
    if gain["mean"] is None:
        return f"The gain over the tuned uniform learning rate is unknown: {gain['reason']}."
    size = f"{abs(gain['mean']):.3f} nats"
    side = "below" if gain["mean"] > 0 else "above"
    if gain["ci95"] is None:
        why = "one seed cannot separate an effect from noise" if seeds == 1 else gain["reason"]
        return f"The best ratios end {size} {side} the tuned uniform learning rate {steps} on the val split; {why}."
    p_value = format_p_value(gain["p_value"])
    p_value = f"p {p_value}" if p_value.startswith("<") else f"p = {p_value}"
    interval = f"95 % CI {format_interval(gain['ci95'], 3, signed=True)}, {p_value}"
    if not gain["significant"]:
        return (
            f"The best ratios and the tuned uniform learning rate cannot be told apart {steps}: gain "
            f"{format_signed(gain['mean'], 3)} nats on the val split ({interval}, {seeds} seeds{_fresh(gain)})."
        )
    verb = "beat" if gain["mean"] > 0 else "LOSE to"
    return (
        f"The best ratios {verb} the tuned uniform learning rate by {size} {steps} on the val split "
        f"({interval}, {seeds} seeds{_fresh(gain)})."
    )


def _is_uniform(content: Mapping[str, Any]) -> bool:
    return bool(content["best"]["trial"] == content["uniform"]["trial"])


def _fresh(gain: Mapping[str, Any]) -> str:
    """Return the gain of the seeds that did not choose the ratios."""
    mean = gain.get("fresh_mean")
    return "" if mean is None else f"; {format_signed(mean, 3)} without the seed that chose"


def _ratios(content: Mapping[str, Any]) -> str:
    if _is_uniform(content):
        warmup = content["best"]["point"]["warmup"]
        return f"The best trial has ratio 1 for every block, and a warm-up of {warmup:.0%} of the steps."
    ratios = ", ".join(f"{block.upper()} {ratio:.3g}" for block, ratio in content["ratios"].items())
    they = "The best ratios" if content["gain"]["mean"] is None else "They"
    return (
        f"{they} are {ratios}, with a base learning rate of {content['lr_factor']:.3g} times the tuned uniform one and "
        f"a warm-up of {content['best']['point']['warmup']:.0%} of the steps."
    )


def _decisions(content: Mapping[str, Any]) -> str:
    blocks = [block for block in content["ratios"] if block != content["reference"]]
    decided = [block.upper() for block in blocks if content["valleys"][block]["decided"]]
    others = [block.upper() for block in blocks if not content["valleys"][block]["decided"]]
    sentences = []
    if decided:
        sentences.append(f"The trials decide that {_listed(decided)} should not have a ratio of 1.")
    if others:
        one = "its ratio" if len(others) == 1 else "each of these ratios alone"
        sentences.append(f"The trials do not decide the ratio of {_listed(others)}: {one} may be noise.")
    return " ".join(sentences)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def warnings(content: Mapping[str, Any]) -> list[str]:
    """Return the limits of the results."""
    found = []
    if stands_for := content["proxy"]["stands_for"]:
        found.append(
            f"The trials trained a proxy, {content['proxy']['size']} with {content['proxy']['parameters']:,} "
            f"parameters, in place of the {stands_for} model. Compare the ratios with uniform on the model itself. The "
            f"--base-lr of the command assumes that the configuration's learning rate was tuned for uniform: replace "
            f"it by {content['lr_factor']:.3g} times your own tuned uniform rate."
        )
    found.append(
        f"The ratios were found for {content['steps']:,} steps. Longer runs win less, and their best ratios may lie "
        "nearer to 1."
    )
    if not content["uniform"]["bracketed"]:
        found.append(
            "The best uniform learning rate is at the edge of those tried, so uniform may not be tuned: give it more "
            "--trials, or another --base-lr with another --out."
        )
    if not content["uniform"].get("warmup_bracketed", True):
        found.append(
            "The best uniform warm-up is at the edge of those tried, so uniform may not be tuned: give it more "
            "--trials."
        )
    if content["near_trials"] < content["needed_trials"]:
        found.append(
            f"{content['near_trials']} trials are near the best one, and the ranges of the ratios need "
            f"{content['needed_trials']}: give it more --trials."
        )
    if content["noise"] is None:
        found.append(
            "The noise between seeds is not known, for want of seeds that differ. The fits assume 0.01 nats."
        )
    uniform = content["uniform_trials"]
    rest = content["counts"]
    found.append(
        f"The best of {sum(rest.values()) - uniform} trials is compared with the best of {uniform} uniform ones. The "
        "tune split chose both, and the val split chose nothing."
    )
    return found


def verdict(valley: Mapping[str, Any]) -> str:
    """Return for a table whether the trials decide that a block's ratio is not 1."""
    if valley["decided"]:
        return "above 1" if valley["value"] > 1 else "below 1"
    return "no"


def format_range(valley: Mapping[str, Any]) -> str:
    """Return the range of a value within the valley, for a table."""
    if not valley["bounded"]:
        return "not known"
    return f"{valley['low']:.2g} to {valley['high']:.2g}"


RANGE_NOTE = (
    f"Within its range, a ratio costs at most {ALLOWED:g} nats while all other blocks stay at their best. The range is "
    "from a fit of parabolas in the logarithm of each learning rate. The cost of 1 is that of giving this block the "
    f"base learning rate, with its standard error. If 1 is more than a factor of {2**REACH:.1f} away, it is the cost "
    "of moving by this factor. A ratio is decided if its range is known and the cost is more than two standard errors; "
    "otherwise, it may be noise."
)
RMS_NOTE = (
    "The last column is the block's peak learning rate over the root mean square of its weights before training. "
    "Between models that start at other scales, compare these quotients."
)


def paste(plan: SearchPlan, content: Mapping[str, Any]) -> dict[str, str]:
    """Return the lines for a user's own training loop, and the command of a run."""
    factor = f"{content['lr_factor']:.3g}"
    ratios = ", ".join(f'"{block}": {ratio:.4g}' for block, ratio in content["ratios"].items())
    warmup = content["best"]["point"]["warmup"]
    python = (
        f"lr = {factor} * LR  # LR is your tuned uniform learning rate\n"
        f"groups = param_groups(model, lr=lr, ratios={{{ratios}}}{_group_options(plan, content)})"
    )
    on_itself = content["proxy"]["stands_for"] is None
    lr = content["best"]["point"]["base_lr"] if on_itself else plan.first_rate * content["lr_factor"]
    words = _train_command(content["command"])
    command = shlex.join(
        [
            *words,
            "--ratios",
            f"{content['out']}/{RATIOS}",
            "--base-lr",
            f"{lr:.3g}",
            "--warmup-fraction",
            f"{warmup:.2g}",
        ]
    )
    pairs = format_pairs({block: float(f"{ratio:.3g}") for block, ratio in content["ratios"].items()})
    return {"python": python, "command": command, "ratios": pairs}


def _group_options(plan: SearchPlan, content: Mapping[str, Any]) -> str:
    """Return the arguments of `param_groups` for which the run does not use the default, each after a comma."""
    config = plan.config(Point.from_dict(content["best"]["point"]))
    optim, settings = config.optim, OptimSettings.of(config)
    options = {}
    if optim.relative_to == "init":
        options["relative_to"] = '"init"'
    if optim.decay != "coupled":
        options["decay"] = f'"{optim.decay}"'
    if settings.no_decay:
        options["no_decay"] = json.dumps(settings.no_decay)
    if settings.weight_decay_by_block:
        options["weight_decay"] = _weight_decays(settings, content["ratios"])
    elif settings.weight_decay != WEIGHT_DECAY:
        options["weight_decay"] = digits(settings.weight_decay)
    return "".join(f", {name}={value}" for name, value in options.items())


def _weight_decays(settings: OptimSettings, blocks: Iterable[str]) -> str:
    """Return the weight decay of single blocks as Python; of all `blocks` if the others do not have the default."""
    decays = dict(settings.weight_decay_by_block)
    if settings.weight_decay != WEIGHT_DECAY:
        every, _ = resolve_decay(decays, "coupled", settings.weight_decay)
        decays = {Block(block): every[Block(block)] for block in blocks} | decays
    return "{" + ", ".join(f'"{block.value}": {digits(decay)}' for block, decay in decays.items()) + "}"


def _train_command(command: str) -> list[str]:
    """Return the words of `blockwise-lr train` for a tune command, without the flags that the search replaces."""
    words = shlex.split(command)
    kept, dropped = ["blockwise-lr", "train", *words[2:3]], False
    for word in words[3:]:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("_", "-")
            dropped = name in _OWN_FLAGS | _FOUND_FLAGS
        if not dropped:
            kept.append(word)
    return kept
