"""The settings of `blockwise-lr sharpness`, which are also its command-line flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from blockwise_lr.analysis.block_overrides import read_overrides
from blockwise_lr.errors import UserError

if TYPE_CHECKING:
    from blockwise_lr.blocks import Block


@dataclass(frozen=True)
class MeasureConfig:
    """The settings of a sharpness measurement. None stands for the value that belongs to the model."""

    data: str | None = None
    """The text, as for train. None: that of the run or preset, otherwise sotu."""
    text_field: str = "text"
    """Name of the text field of --data in .jsonl, .parquet and Hugging Face data sets."""
    tokenizer: str | None = None
    """Id or folder of a Hugging Face tokenizer. None: the model's own."""
    estimator: Literal["fisher", "empirical", "hutchinson"] = "fisher"
    """"fisher": Gauss-Newton with labels sampled from the model; "empirical": with the labels of the text (biased);
    "hutchinson": the true Hessian (slower and noisier)."""
    batches: int = 16
    """Number of batches to measure on; the standard errors are over these batches."""
    batch_size: int | None = None
    """Windows per batch. None: that of the run or preset, otherwise 4."""
    context: int | None = None
    """Window length in tokens. None: that of the run or preset, otherwise 512 or the model's longest."""
    probes: int = 1
    """Random draws per batch (fisher, hutchinson)."""
    seed: int = 0
    """Seed of sampled labels, random signs, masked tokens, and of a preset's initial weights."""
    blocks: tuple[str, ...] = ()
    """Overrides, applied before the rules: each REGEX=BLOCK, such as 'transform=other', or a .json file of them."""
    directional: bool = False
    """Measure along the optimizer's update instead: which learning rate each block could take (runs only)."""
    histogram: bool = False
    """Also draw the distribution of sharpness over the elements of each block (the paper's density figure)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to measure on; "auto": a GPU if there is one."""

    @property
    def overrides(self) -> dict[str | type[Any], Block]:
        """The overrides in `blocks`, as ``classify`` takes them.

        Raises:
            UserError: an entry is neither REGEX=BLOCK nor a .json file of such pairs.
        """
        return read_overrides(self.blocks)

    def check(self) -> None:
        """Check all values.

        Raises:
            UserError: a value is out of range, or does not apply to the estimator or to the text.
        """
        from blockwise_lr.train.ranges import check_seed  # imported here because it loads torch

        for name, value, least in (
            ("batches", self.batches, 1),
            ("batch-size", self.batch_size, 1),
            ("context", self.context, 2),
            ("probes", self.probes, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"--{name} is {value}; expected {least} or more")
        check_seed(self.seed, "--seed")
        if self.data is None and self.text_field != MeasureConfig.text_field:
            raise UserError(
                f"--text-field {self.text_field} is for --data; the model's own text has its field: leave it out, or "
                "name a text"
            )
        _ = self.overrides
        if self.probes > 1 and self.estimator == "empirical":
            raise UserError(
                f"--probes is {self.probes}, but --estimator empirical draws nothing at random: leave --probes out, "
                "or choose another estimator"
            )
        if self.directional:
            default = MeasureConfig()
            for name in ("estimator", "probes", "histogram", "blocks"):
                if (given := getattr(self, name)) != getattr(default, name):
                    raise UserError(
                        f"--{name} {given} is about average sharpness; --directional has none: leave out one of them"
                    )
        if self.histogram and self.estimator == "hutchinson":
            raise UserError(
                "--histogram is for squared gradients; --estimator hutchinson has none: leave --histogram out, or "
                "choose another estimator"
            )
