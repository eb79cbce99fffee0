"""`blockwise-lr inspect`: which parameter is in which block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockwise_lr.cli.flags import parse
from blockwise_lr.cli.interrupts import at_work
from blockwise_lr.errors import UserError

if TYPE_CHECKING:
    from blockwise_lr.blocks import Block


@dataclass(frozen=True)
class InspectCommand:
    """Which parameter of a model is in which block; nothing but its configuration is read."""

    verbose: bool = False
    """Show every parameter with the reason for its block."""
    json: bool = False
    """Print JSON."""
    ratios: str = "paper"
    """The ratios to show beside the blocks, as for train."""
    blocks: tuple[str, ...] = ()
    """Blocks of parameters, before all rules: each REGEX=BLOCK, such as 'transform=other', or a .json file of them."""
    trust_remote_code: bool = False
    """Run the code that a Hugging Face model brings along."""


def run(arguments: list[str]) -> None:
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        raise UserError(
            "inspect needs a model first: a preset, a folder or id of Hugging Face, or module:function"
        )
    asks = arguments[0] in ("-h", "--help")
    name, rest = ("MODEL", arguments) if asks else (arguments[0], arguments[1:])
    parsed = parse(InspectCommand, f"inspect {name}", rest)
    from blockwise_lr.analysis.block_overrides import read_overrides
    from blockwise_lr.analysis.block_table import inspect_model
    from blockwise_lr.analysis.meta_models import model_to_inspect

    at_work()
    overrides, ratios = read_overrides(parsed.blocks), _ratios(parsed.ratios)
    model = model_to_inspect(name, trust_remote_code=parsed.trust_remote_code)
    inspect_model(model, overrides=overrides, ratios=ratios, verbose=parsed.verbose, as_json=parsed.json)


def _ratios(text: str) -> dict[Block, float]:
    from blockwise_lr.train.ratio_text import parse_ratios

    try:
        return parse_ratios(text)
    except ValueError as error:
        raise UserError(f"--{error}") from None
