"""What one training run is: typed, immutable, and the same thing as the command line and config.json."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import tyro

from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.errors import UserError
from blockwise_lr.estimator_names import Estimator


@dataclass(frozen=True)
class ModelConfig:
    """The Transformer to pre-train, built from transformers' own classes."""

    family: Literal["llama", "gpt2"] = "llama"
    """Architecture: LlamaForCausalLM or GPT2LMHeadModel."""
    hidden_size: int = 128
    """Width of the residual stream, in channels."""
    layers: int = 4
    """Number of Transformer layers."""
    heads: int = 2
    """Number of attention heads; hidden_size must be a multiple of it."""
    kv_heads: int | None = None
    """Number of key/value heads (LLaMA); None: as many as heads."""
    ffn_size: int | None = None
    """Width of the feed-forward layer, in channels; None: 4 x hidden_size."""
    vocab_size: int = 3072
    """Rows of the embedding, in tokens; at least the tokenizer's vocabulary."""
    context: int = 128
    """Length of a training sequence, in tokens."""
    tied: bool = False
    """Whether the output head shares the token embedding."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, the learning rate of each block, and their schedule."""

    optimizer: str = "adamw"
    """Name of the optimizer (adamw, nadamw, adafactor, sgd, muon, adam-mini, lion, soap, ademamix, adan), or the import
    path of any other, module:Class, such as torch.optim:RAdam."""
    base_lr: float = 6e-4
    """Peak learning rate of a block whose ratio is 1. For the ratios measured and auto: about a quarter of a tuned
    uniform learning rate."""
    ratios: str = "paper"
    """Learning-rate ratio of each block: "uniform", "paper", "measured" (along runs of a small model), "quickstart",
    pairs such as emb=4,vo=0.5, a JSON file ({block: ratio}, sharpness.json or directional.json), or "auto": those
    measured, moved in the first part of the run."""
    re_measure: int = 0
    """With --ratios auto: go on after the first part, every so many steps; 0: the ratios then rest."""
    beta1: float | None = None
    """Decay of the first moment's moving average, per step; None: the optimizer's own (AdamW: 0.9)."""
    beta2: float | None = None
    """Decay of the second moment's moving average, per step; None: the optimizer's own (AdamW: 0.95)."""
    eps: float | None = None
    """Added to the square root of the second moment; None: the optimizer's own (AdamW: 1e-8)."""
    weight_decay: float | None = None
    """Decoupled weight decay, per unit of learning rate; None: the optimizer's own (AdamW: 0.1)."""
    weight_decay_by_block: str = ""
    """The same for single blocks, as pairs such as emb=0,norm=0,ffn=0.2; the others keep weight_decay."""
    decay: Literal["coupled", "constant"] = "coupled"
    """"coupled": a block's decay is lr * weight_decay, so it grows with its ratio (the paper's way);
    "constant": every block decays as at the base learning rate."""
    no_decay: str = ""
    """Blocks without weight decay, comma-separated ("norm,emb"), or "1d" for all vectors; empty: none."""
    clip: float = 1.0
    """Largest L2 norm of the whole gradient; 0: no clipping."""
    clip_by_block: str = ""
    """Largest L2 norm of each block's gradient, in the place of clip: one number for all (1.0), or pairs such as
    emb=0.5,ffn=1, the other blocks then not being clipped; empty: clip as a whole."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or a gradient that is NaN or infinite: "stop" the run, with the block and the parameter named, or
    "skip" that update and count it. Either way it never reaches the optimizer."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Shape of the learning rate over the steps."""
    warmup_fraction: float = 0.02
    """Linear warm-up, as a share of the steps."""
    warmup_steps: int | None = None
    """Linear warm-up in steps; takes precedence over warmup_fraction."""
    warmup_start: Literal["above_zero", "zero"] = "above_zero"
    """"above_zero": the first update has the peak divided by the warm-up's steps; "zero": it has a learning rate of 0,
    as in the authors' code and in runs of earlier versions."""
    warmup: Literal["shared", "equal_slope"] = "shared"
    """"shared": every block warms up over the same steps; "equal_slope": over ratio times as many."""
    floor_fraction: float = 0.05
    """Final learning rate as a share of base_lr."""
    floor: Literal["shared", "proportional"] = "shared"
    """"shared": all blocks end at one learning rate (the paper's way); "proportional": at their peak's share."""

    def resolved(self) -> OptimConfig:
        """The same with numbers for what is None, where the optimizer has such a thing.

        Raises:
            UserError: an unknown optimizer, or one whose package is missing.

        Example:
            >>> OptimConfig(optimizer="lion", beta2=0.99).resolved().beta1
            0.95
        """
        from blockwise_lr.optimizers.registry import optimizer_entry  # not at the top: it brings torch

        try:
            entry = optimizer_entry(self.optimizer)
        except (ValueError, ImportError) as error:
            raise UserError(f"--{error}") from None
        own = {name: getattr(entry, name) for name in ("beta1", "beta2", "eps", "weight_decay")}
        return dataclasses.replace(
            self, **{name: value for name, value in own.items() if getattr(self, name) is None}
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `config.json` in a run's folder holds exactly these fields."""

    preset: Annotated[str, tyro.conf.Suppress] = "quickstart"
    """Name of the preset that the values started from."""
    steps: int = 400
    """Optimizer steps in the run."""
    batch_size: int = 16
    """Sequences of one micro-batch, on each process."""
    accumulation: int = 1
    """Micro-batches summed into one optimizer step, on each process."""
    seed: int = 0
    """Seed of the run; init_seed and data_seed follow it unless given."""
    init_seed: int | None = None
    """Seed of the initial weights; None: seed."""
    data_seed: int | None = None
    """Seed of the data order; None: seed."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """"bf16": weights in fp32, forward and backward under bf16 autocast; "fp32": no autocast; "auto": bf16 where the
    device has instructions for it, otherwise fp32, since a CPU that emulates bf16 trains far slower.
    Evaluation is always in fp32."""
    tf32: bool = False
    """With --precision fp32 on a GPU: compute matrix products of the training steps in TF32, which keeps 10 bits of
    the mantissa. Evaluation and measurements stay in full fp32."""
    compile: bool = False
    """Compile the model with torch.compile. TF32 stays off: see tf32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; "auto": a GPU if there is one."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 50
    """Steps between two validation losses, a multiple of log_every; 0: only at the end."""
    eval_tokens: int = 49_152
    """Tokens of the fixed validation set (and of the tune set); 0: the whole split."""
    save_every: int = 100
    """Steps between two checkpoints, a multiple of log_every; 0: only at the end."""
    keep_checkpoints: int = 2
    """How many of the newest whole checkpoints to keep."""
    report_to: str = "tensorboard"
    """Where Trainer reports to, comma-separated: tensorboard, wandb, trackio, none."""
    sharpness_every: int = 0
    """Steps between two measurements of every block's sharpness (sharpness.jsonl), step 0 included; 0: none."""
    sharpness_at: tuple[int, ...] = ()
    """Steps to measure sharpness at besides; 0: before training."""
    sharpness_estimators: tuple[Estimator, ...] = ("fisher",)
    """How sharpness is measured: "fisher" and "hutchinson" on the measure split; "empirical" off the training's own
    gradients and "optimizer" off Adam's second moment, which cost next to nothing and are biased."""
    sharpness_batches: int = 1
    """Micro-batches (of batch_size sequences, on each process) of one measurement by fisher or hutchinson."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def to_dict(self) -> dict[str, Any]:
        """As plain nested dictionaries and lists, for JSON."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


MEASUREMENT_FIELDS = frozenset(
    {"sharpness_every", "sharpness_at", "sharpness_estimators", "sharpness_batches"}
)
"""Fields that say what is measured; the training is the same to the bit."""

FREE_FIELDS = MEASUREMENT_FIELDS | {"preset", "save_every", "keep_checkpoints", "report_to", "data.cache"}
"""Fields on which no number of a run depends: they may differ between a run and its resumption."""


_LATER_FIELDS: Mapping[str, Any] = {
    "tf32": False,
    "optim.re_measure": 0,
    "optim.weight_decay_by_block": "",
    "optim.clip_by_block": "",
    "optim.on_nonfinite": "stop",
    "optim.warmup_start": "zero",
}
"""Fields that came later, with the value that changes nothing: runs from before are the same runs."""


_SAVED_FIELDS = frozenset({"optimizer", "base_lr", "schedule", "warmup_fraction", "floor_fraction"})
"""Fields of `optim` that every saved configuration has. A configuration written by hand names a few fields only."""


def identity(config: TrainConfig) -> dict[str, Any]:
    """Everything that can change a run's numbers, as {"optim.base_lr": ...}: equal for runs that are the same.

    Example:
        >>> identity(TrainConfig(report_to="none")) == identity(TrainConfig())
        True
    """
    # Through config_from_dict, so that 1 and 1.0 are the same configuration; and None is what it stands for.
    same = config_from_dict(config.to_dict())
    fields = _flatten(dataclasses.replace(same, optim=same.optim.resolved()).to_dict())
    return {
        name: value
        for name, value in fields.items()
        if name not in FREE_FIELDS and not (name in _LATER_FIELDS and value == _LATER_FIELDS[name])
    }


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(
            _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


def config_from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration that :meth:`TrainConfig.to_dict` gave.

    A saved configuration without ``optim.warmup_start`` is of an earlier version, and means "zero".

    Raises:
        UserError: no such mapping, a field that does not exist, or a value of another type than the field's.

    Example:
        >>> config_from_dict(TrainConfig(steps=7).to_dict()).steps
        7
    """
    if not isinstance(values, Mapping):
        raise UserError(f"configuration: it is {type(values).__name__}; expected an object of fields")
    optim = values.get("optim")
    if isinstance(optim, Mapping) and optim.keys() >= _SAVED_FIELDS:
        # Its warm-up began at 0 when the run was trained, whatever the default is now.
        values = {**values, "optim": {"warmup_start": "zero", **optim}}
    return _from_dict(TrainConfig, values, "")


T = TypeVar("T")


def _from_dict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    hints = get_type_hints(cls)
    unknown = sorted(map(str, set(values) - set(hints)))
    if unknown:
        name = unknown[0] if unknown[0].isidentifier() else repr(unknown[0])
        raise UserError(f"configuration: no field named {where}{name}; the fields are {', '.join(hints)}")
    fields = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise UserError(f"configuration: {where}{name} is {value!r}; expected an object of fields")
            fields[name] = _from_dict(cast("type[Any]", hint), value, f"{where}{name}.")
        elif not _fits(value, hint):
            raise UserError(f"configuration: {where}{name} is {value!r}; expected {_spell(hint)}")
        elif get_origin(hint) is tuple:
            fields[name] = tuple(value)
        else:
            is_number = hint is float or (float in get_args(hint) and value is not None)
            fields[name] = float(value) if is_number else value
    return cls(**fields)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:  # of any length; JSON has lists
        return isinstance(value, (list, tuple)) and all(_fits(each, get_args(hint)[0]) for each in value)
    options = get_args(hint) or (hint,)  # `int | None` has its options as arguments
    if isinstance(value, bool):
        return bool in options
    if float in options and isinstance(value, int):
        return abs(value) <= sys.float_info.max
    return any(isinstance(value, option) for option in options)


def _spell(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list of {_spell(get_args(hint)[0])}"
    return hint.__name__ if isinstance(hint, type) else str(hint)
