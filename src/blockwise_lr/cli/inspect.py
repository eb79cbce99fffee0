"""The command `blockwise-lr inspect`: show which block each parameter belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from blockwise_lr.cli.flags import parse
from blockwise_lr.cli.interrupts import end_startup
from blockwise_lr.errors import UserError

if TYPE_CHECKING:
    from blockwise_lr.blocks import Block


@dataclass(frozen=True)
class InspectCommand:
    """Show which block each parameter of a model belongs to. Only its configuration is read, not its weights.

    The table also shows the scale of each block before training, which follows from the model's initializer.
    """

    verbose: bool = False
    """Also list every parameter with the reason for its block."""
    json: bool = False
    """Print JSON instead of a table."""
    ratios: str = "half"
    """Learning-rate ratios to show for the blocks, as for train."""
    relative_to: Literal["lr", "init"] = "lr"
    """What the ratios relate to, as for train. "init": the learning rate over the block's initial scale."""
    blocks: tuple[str, ...] = ()
    """Overrides, applied before the rules: each REGEX=BLOCK, such as 'transform=other', or a .json file of them."""
    trust_remote_code: bool = False
    """Allow a Hugging Face model to run the code in its repository."""


def run(arguments: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        raise UserError(
            "inspect needs a model first: a preset, a folder or id of Hugging Face, or module:function"
        )
    wants_help = arguments[0] in ("-h", "--help")
    name, rest = ("MODEL", arguments) if wants_help else (arguments[0], arguments[1:])
    parsed = parse(InspectCommand, f"inspect {name}", rest)
    from blockwise_lr.analysis.block_overrides import read_overrides
    from blockwise_lr.analysis.block_table import inspect_model
    from blockwise_lr.analysis.meta_models import model_to_inspect
    from blockwise_lr.train.initial_rms import initial_rms_of

    end_startup()
    overrides, ratios = read_overrides(parsed.blocks), _ratios(parsed.ratios)
    model, rms = initial_rms_of(lambda: model_to_inspect(name, trust_remote_code=parsed.trust_remote_code))
    inspect_model(
        model,
        overrides=overrides,
        ratios=ratios,
        rms=rms,
        relative_to_init=parsed.relative_to == "init",
        verbose=parsed.verbose,
        as_json=parsed.json,
    )


def _ratios(text: str) -> dict[Block, float]:
    from blockwise_lr.train.ratio_text import parse_ratios

    try:
        return parse_ratios(text)
    except ValueError as error:
        raise UserError(f"--{error}") from None
