"""The command `blockwise-lr export`: learning rates by block for another trainer, or a plain Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from blockwise_lr.cli.flags import parse
from blockwise_lr.cli.interrupts import end_startup
from blockwise_lr.errors import UserError

if TYPE_CHECKING:
    from blockwise_lr.blocks import Block


@dataclass(frozen=True)
class ExportCommand:
    """Export the learning rates of a model's blocks as another trainer's configuration, or a run as a plain folder.

    With --to huggingface, the model of a run or checkpoint is written as a plain folder in its original layout,
    however many processes saved it. With any other --to, the trainer's configuration is printed. Its patterns are
    checked against every parameter of the model, of which only the configuration is read.
    """

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """For a trainer: as for inspect. For huggingface: a run's folder (its newest checkpoint is exported), or one of
    its checkpoints, or a sharded checkpoint."""
    to: Literal[
        "huggingface", "torchtitan", "automodel", "megatron", "olmo-core", "fairseq2", "axolotl", "timm", "json",
        "optax", "nanochat", "litgpt",
    ] = "huggingface"  # fmt: skip
    """The trainer; "json" holds the groups of plain torch, for DeepSpeed and loops of your own. LitGPT is refused,
    with the reason. "huggingface" writes a model."""
    out: Path | None = None
    """The file to write. None: print it. For huggingface: the folder to write."""
    lr: float | None = None
    """Base learning rate: the uniform one that you use now. None leaves it to the trainer, where that is possible;
    in "json", every lr is then null, and your program multiplies lr_ratio by its own."""
    ratios: str | None = None
    """Learning-rate ratios, as for train, but fixed ones. None: the default of param_groups."""
    weight_decay: float | None = None
    """Weight decay. None: the default of param_groups."""
    names: Literal["auto", "model"] = "auto"
    """Whose parameter names the patterns are for. "auto": those of the trainer's own model code, where it has the
    model. "model": those of MODEL."""
    blocks: tuple[str, ...] = ()
    """Overrides, applied before the rules: each REGEX=BLOCK, such as 'transform=other', or a .json file of them."""
    trust_remote_code: bool = False
    """Allow a Hugging Face model to run the code in its repository."""


def run(arguments: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    parsed = parse(ExportCommand, "export", arguments)
    if parsed.to == "huggingface":
        _write_folder(parsed)
    else:
        _write_rates(parsed)


def _write_folder(parsed: ExportCommand) -> None:
    given = {
        "--lr": parsed.lr is not None,
        "--ratios": parsed.ratios is not None,
        "--weight-decay": parsed.weight_decay is not None,
        "--names": parsed.names != "auto",
        "--blocks": bool(parsed.blocks),
        "--trust-remote-code": parsed.trust_remote_code,
    }
    if flags := [flag for flag, is_given in given.items() if is_given]:
        raise UserError(
            f"{' and '.join(flags)}: for learning rates of another trainer, and --to is huggingface, which writes a "
            f"model: add --to torchtitan, or another trainer, or leave out {' and '.join(flags)}"
        )
    if parsed.out is None:
        raise UserError(
            "export --to huggingface needs a folder to write: add --out DIR; to export learning rates to another "
            "trainer, add --to torchtitan, or another trainer"
        )
    from blockwise_lr.checkpoints.hugging_face import export_checkpoint

    end_startup()
    print(f"{parsed.out}: the model of {export_checkpoint(Path(parsed.model), parsed.out)}")


def _write_rates(parsed: ExportCommand) -> None:
    from blockwise_lr.analysis.block_overrides import read_overrides
    from blockwise_lr.analysis.meta_models import model_to_inspect
    from blockwise_lr.blocks import classify
    from blockwise_lr.export import REFUSED, export_rates
    from blockwise_lr.files import check_name, write_text_atomic
    from blockwise_lr.optim.decay import WEIGHT_DECAY

    end_startup()
    if parsed.to in REFUSED:
        raise UserError(REFUSED[parsed.to])
    if parsed.out is not None:
        check_name(parsed.out, "--out")
        if parsed.out.is_dir():
            raise UserError(f"{parsed.out} is a folder; expected the name of a file: choose another --out")
        if not parsed.out.parent.is_dir():
            raise UserError(
                f"--out {parsed.out}: {parsed.out.parent} is no folder; expected a file in a folder that exists: make "
                "the folder, or choose another --out"
            )
    ratios = None if parsed.ratios is None else _fixed_ratios(parsed.ratios)
    overrides = read_overrides(parsed.blocks)
    model = model_to_inspect(parsed.model, trust_remote_code=parsed.trust_remote_code)
    try:
        exported = export_rates(
            model,
            parsed.to,
            lr=parsed.lr,
            ratios=ratios,
            weight_decay=WEIGHT_DECAY if parsed.weight_decay is None else parsed.weight_decay,
            blocks=classify(model, overrides),
            names=parsed.names,
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(_with_flag(str(error))) from None
    if parsed.out is None:
        print(exported.text, end="")
        return
    write_text_atomic(parsed.out, exported.text)
    print(f"{parsed.out}: learning rates by block for {parsed.to}, under the names of {exported.naming}")
    for each in exported.lost:
        print(f"lost: {each}")


def _with_flag(message: str) -> str:
    """Return a message of the library with the flag in place of the argument that it begins with."""
    argument, _, rest = message.partition(" ")
    return f"--{argument.replace('_', '-')} {rest}" if argument in ("lr", "weight_decay") else message


def _fixed_ratios(text: str) -> dict[Block, float]:
    from blockwise_lr.train.ratio_text import parse_moving, parse_ratios

    try:
        if parse_moving(text) is not None:
            raise UserError(
                f"--ratios {text} changes the ratios during the run, and a configuration holds fixed ones: "
                "choose another --ratios, such as paper or measured"
            )
        return parse_ratios(text)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--{error}") from None
