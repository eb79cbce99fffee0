"""The configuration of a training run: immutable dataclasses that define the command line and config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.errors import UserError
from blockwise_lr.estimator_names import Estimator
from blockwise_lr.train.config_fields import flatten, from_mapping


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
    """Number of attention heads; must divide hidden_size."""
    kv_heads: int | None = None
    """Number of key/value heads (LLaMA only); None: the value of heads."""
    ffn_size: int | None = None
    """Width of the feed-forward layer, in channels; None: 4 x hidden_size."""
    vocab_size: int = 3072
    """Rows of the token embedding; at least the size of the tokenizer's vocabulary."""
    context: int = 128
    """Length of a training sequence, in tokens."""
    tied: bool = False
    """Tie the output head to the token embedding, so that they share one weight."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, the learning rate of each block, and their schedule."""

    optimizer: str = "adamw"
    """Name of the optimizer (adamw, nadamw, adafactor, sgd, muon, adam-mini, lion, soap, ademamix, adan). For any
    other optimizer, its import path as module:Class, such as torch.optim:RAdam."""
    base_lr: float = 6e-4
    """Base learning rate: the peak learning rate of a block whose ratio is 1. With --ratios half, use a tuned uniform
    learning rate; with --ratios measured or auto, about a quarter of it."""
    ratios: str = "half"
    """Learning-rate ratio of each block: a name ("half"; "measured", for short runs; "paper", to reproduce the paper;
    "uniform"; "quickstart"); pairs such as emb=4,vo=0.5; a JSON file ({block: ratio}, sharpness.json or
    directional.json); or "auto", which starts from the measured ratios and adjusts them in the first part of the
    run."""
    relative_to: Literal["lr", "init"] = "lr"
    """What the ratios relate to. "lr": the learning rate of each block. "init": that learning rate over the block's
    initial scale, so that the ratios carry between initialisations. The two are equal for a LLaMA of this command."""
    re_measure: int = 0
    """With --ratios auto: after the first part of the run, adjust the ratios again every this many steps; 0: keep the
    ratios fixed from then on."""
    beta1: float | None = None
    """Decay rate of the first moment's moving average, per step; None: the optimizer's default (AdamW: 0.9)."""
    beta2: float | None = None
    """Decay rate of the second moment's moving average, per step; None: the optimizer's default (AdamW: 0.95)."""
    eps: float | None = None
    """Constant added to the square root of the second moment; None: the optimizer's default (AdamW: 1e-8)."""
    weight_decay: float | None = None
    """Decoupled weight decay, per unit of learning rate; None: the optimizer's default (AdamW: 0.1)."""
    weight_decay_by_block: str = ""
    """Weight decay of single blocks, as pairs such as emb=0,norm=0,ffn=0.2; all other blocks use weight_decay."""
    decay: Literal["coupled", "constant"] = "coupled"
    """How weight decay scales with a block's learning rate. "coupled": a step decays weights by lr * weight_decay,
    which grows with the block's ratio, as in the paper. "constant": all blocks decay as at the base learning rate."""
    no_decay: str = ""
    """Blocks without weight decay, comma-separated ("norm,emb"), or "1d" for all vectors; empty: all blocks decay."""
    clip: float = 1.0
    """Clip the gradient of the whole model to this L2 norm; 0: no clipping."""
    clip_by_block: str = ""
    """Clip each block's gradient to its own L2 norm, instead of clip. One number for all blocks (1.0), or pairs such as
    emb=0.5,ffn=1, which leave all other blocks unclipped; empty: use clip."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when the loss or the gradient is NaN or infinite. "stop": end the run and name the block and the
    parameter. "skip": skip the update and count it. In both cases the gradient never reaches the optimizer."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Learning-rate schedule: cosine decay, or warmup-stable-decay (wsd)."""
    warmup_fraction: float = 0.02
    """Length of the linear warm-up, as a fraction of the steps."""
    warmup_steps: int | None = None
    """Length of the linear warm-up, in steps; overrides warmup_fraction."""
    warmup_start: Literal["above_zero", "zero"] = "above_zero"
    """Learning rate of the first update. "above_zero": the peak divided by the number of warm-up steps. "zero": 0, as
    in the authors' code and in runs of earlier versions."""
    warmup: Literal["shared", "equal_slope"] = "shared"
    """"shared": all blocks warm up over the same steps. "equal_slope": each block warms up over ratio times as many
    steps, so that all learning rates rise at the same slope."""
    floor_fraction: float = 0.05
    """Final learning rate, as a fraction of base_lr."""
    floor: Literal["shared", "proportional"] = "shared"
    """"shared": all blocks end at the same learning rate, as in the paper. "proportional": each block ends at
    floor_fraction of its own peak."""

    def resolved(self) -> OptimConfig:
        """Return a copy in which the optimizer's own defaults replace None.

        A setting that the optimizer does not have stays None.

        Raises:
            UserError: the optimizer is unknown, or its package is missing.

        Example:
            >>> OptimConfig(optimizer="lion", beta2=0.99).resolved().beta1
            0.95
        """
        from blockwise_lr.optimizers.registry import optimizer_entry  # imported here: it imports torch

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
    """One training run. "train" in a run's config.json holds exactly these fields."""

    preset: Annotated[str, tyro.conf.Suppress] = "quickstart"
    """Name of the preset that the other values started from."""
    steps: int = 400
    """Optimizer steps in the run."""
    batch_size: int = 16
    """Sequences in one micro-batch, on each process."""
    accumulation: int = 1
    """Gradient accumulation: micro-batches in one optimizer step, on each process."""
    seed: int = 0
    """Seed of the run: the default of init_seed and data_seed."""
    init_seed: int | None = None
    """Seed of the initial weights; None: the value of seed."""
    data_seed: int | None = None
    """Seed of the data order; None: the value of seed."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the training steps. "bf16": weights in fp32, forward and backward pass under bf16 autocast. "fp32":
    no autocast. "auto": bf16 if the device has instructions for it, otherwise fp32, because emulated bf16 trains far
    slower. Evaluation is always in fp32."""
    tf32: bool = False
    """With --precision fp32 on a GPU: compute the matrix products of the training steps in TF32, which keeps 10 bits of
    the mantissa. Evaluation and measurements stay in full fp32."""
    compile: bool = False
    """Compile the repeated layers and the loss with torch.compile. TF32 stays off unless tf32 is set."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; "auto": a GPU if there is one, otherwise the CPU."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 50
    """Steps between two evaluations, a multiple of log_every; 0: evaluate only at the end."""
    eval_tokens: int = 49_152
    """Tokens of the fixed validation set, and of the tune set; 0: the whole split."""
    save_every: int = 100
    """Steps between two checkpoints, a multiple of log_every; 0: save only at the end."""
    keep_checkpoints: int = 2
    """Number of complete checkpoints to keep; older ones are deleted."""
    report_to: str = "tensorboard"
    """Experiment trackers, comma-separated: tensorboard, wandb, trackio; none: no tracker."""
    sharpness_every: int = 0
    """Steps between two measurements of every block's sharpness (sharpness.jsonl), from step 0 on; 0: none."""
    sharpness_at: tuple[int, ...] = ()
    """Further steps at which to measure sharpness; step 0 is before training."""
    sharpness_estimators: tuple[Estimator, ...] = ("fisher",)
    """Estimators of sharpness. "fisher" and "hutchinson" are computed on the measure split. "empirical" uses the
    gradients of training and "optimizer" uses Adam's second moment: both cost almost nothing, but are biased."""
    sharpness_batches: int = 1
    """Micro-batches in one measurement by fisher or hutchinson, each of batch_size sequences on each process."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as nested dictionaries and lists, for JSON."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


MEASUREMENT_FIELDS = frozenset(
    {"sharpness_every", "sharpness_at", "sharpness_estimators", "sharpness_batches"}
)
"""Fields that set what is measured. Training is bit-identical for all their values."""

FREE_FIELDS = MEASUREMENT_FIELDS | {"preset", "save_every", "keep_checkpoints", "report_to", "data.cache"}
"""Fields that may change when a run is resumed, because no number of the run depends on them."""


_LATER_FIELDS: Mapping[str, Any] = {
    "tf32": False,
    "optim.relative_to": "lr",
    "optim.re_measure": 0,
    "optim.weight_decay_by_block": "",
    "optim.clip_by_block": "",
    "optim.on_nonfinite": "stop",
    "optim.warmup_start": "zero",
}
"""Fields added in later versions, with the value that older runs have. With that value, `identity` leaves them out."""


_SAVED_FIELDS = frozenset({"optimizer", "base_lr", "schedule", "warmup_fraction", "floor_fraction"})
"""Fields of `optim` that every saved configuration has. They tell it from one written by hand, which has few fields."""


def identity(config: TrainConfig) -> dict[str, Any]:
    """Return every field that can change a run's numbers, as {"optim.base_lr": ...}.

    Two configurations of the same run have equal identities.

    Example:
        >>> identity(TrainConfig(report_to="none")) == identity(TrainConfig())
        True
    """
    # config_from_dict makes 1 and 1.0 equal; `resolved` replaces None by the value that it stands for.
    same = config_from_dict(config.to_dict())
    fields = flatten(dataclasses.replace(same, optim=same.optim.resolved()).to_dict())
    return {
        name: value
        for name, value in fields.items()
        if name not in FREE_FIELDS and not (name in _LATER_FIELDS and value == _LATER_FIELDS[name])
    }


def config_from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration that :meth:`TrainConfig.to_dict` wrote.

    A saved configuration without ``optim.warmup_start`` comes from an earlier version, which always used "zero".

    Args:
        values: nested mappings of fields; missing fields have their defaults.

    Raises:
        UserError: `values` is no mapping, a field does not exist, or a value has the wrong type.

    Example:
        >>> config_from_dict(TrainConfig(steps=7).to_dict()).steps
        7
    """
    if not isinstance(values, Mapping):
        raise UserError(f"configuration: it is {type(values).__name__}; expected an object of fields")
    optim = values.get("optim")
    if isinstance(optim, Mapping) and optim.keys() >= _SAVED_FIELDS:
        # The default has changed since: when this run was trained, its warm-up began at 0.
        values = {**values, "optim": {"warmup_start": "zero", **optim}}
    return from_mapping(TrainConfig, values)
