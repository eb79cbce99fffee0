"""Export a checkpoint to a plain Hugging Face folder, in the original layout, in one process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch.distributed.checkpoint.state_dict_loader import load

from blockwise_lr.blocks import merge_fused, split_fused
from blockwise_lr.checkpoints.dcp_reader import SafeReader
from blockwise_lr.checkpoints.manifest import LAYOUT, find_checkpoint, problem_with
from blockwise_lr.checkpoints.sharded_contents import check_model, use_stored_dtypes, weights_of
from blockwise_lr.errors import UserError
from blockwise_lr.extras import check
from blockwise_lr.files import check_name, make_folder, reading, storing
from blockwise_lr.reason import reason

# A checkpoint of Trainer also holds the optimizer's state, which is not exported.
_MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "emoji.json", "bpe.codes", "tekken.json",
    "*.model", "*.spm",
    "chat_template.*", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""Files of transformers' tokenizers: settings, vocabularies, vocabularies of SentencePiece, and chat templates."""


def export_checkpoint(checkpoint: Path, out: Path) -> Path:
    """Write the model of a checkpoint to a folder that ``AutoModelForCausalLM.from_pretrained(out)`` loads.

    Args:
        checkpoint: a sharded checkpoint of a transformers causal LM, saved by any number of ranks
            (:func:`blockwise_lr.integrations.sharded.save_sharded`), or one checkpoint of a run of ``train``. Or the
            folder of either, whose newest complete checkpoint is exported.
        out: the new folder.

    Returns:
        The checkpoint folder that was exported.

    Raises:
        UserError: there is no complete checkpoint, it has no config.json, `out` has files already, or it is the
            current folder.

    Example:
        >>> export_checkpoint(Path("run/checkpoint-100"), Path("exported"))  # doctest: +SKIP
    """
    check_name(out, "--out")
    with reading(out):
        folder = _new_folder(out)
    with reading(checkpoint):
        source, sharded = _source(checkpoint)
    make_folder(out.parent)
    hidden = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(hidden, ignore_errors=True)  # an interrupted export may have left it
    make_folder(hidden)
    try:
        _fill(hidden, source, sharded=sharded)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    if folder.is_dir():
        folder.rmdir()
    hidden.rename(folder)
    return source


def _new_folder(out: Path) -> Path:
    """Return the folder to write, with links resolved.

    Raises:
        UserError: `out` has files already, is a file, or is the current folder.
    """
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"the folder {out} has files already: choose another --out")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected the name of a new folder: choose another --out")
    folder = Path(os.path.realpath(out))
    if folder.is_dir() and folder.samefile("."):
        raise UserError(
            f"{out} is the current folder, which the export would replace; expected the name of a new folder: choose "
            "another --out"
        )
    return folder


def _source(checkpoint: Path) -> tuple[Path, bool]:
    """Return the checkpoint to export, and whether it is sharded.

    Raises:
        UserError: there is no complete checkpoint, or it has no config.json or no weights.
    """
    if not (checkpoint / LAYOUT).exists():
        source = find_checkpoint(checkpoint)
    elif problem := problem_with(checkpoint):
        raise UserError(f"{checkpoint} is not a complete checkpoint: {problem}; choose another checkpoint")
    else:
        source = checkpoint
    sharded = (source / LAYOUT).exists()
    if not (source / "config.json").exists():
        raise UserError(f"{source} has no config.json: expected a checkpoint of a transformers model")
    if not sharded and not any(source.glob("*.safetensors")):
        raise UserError(f"{source} has no weights (model.safetensors): choose another checkpoint")
    return source, sharded


def _fill(out: Path, source: Path, *, sharded: bool) -> None:
    if sharded:
        _assemble(source, out)
    for pattern in (*(() if sharded else _MODEL_FILES), *_TOKENIZER_FILES):
        for file in filter(Path.is_file, source.glob(pattern)):
            target = out / file.relative_to(source)
            with storing(target):
                target.parent.mkdir(exist_ok=True)
                shutil.copy2(file, target)


def _assemble(source: Path, out: Path) -> None:
    check("the export to a Hugging Face folder needs", ["transformers", "safetensors"])
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))  # type: ignore[no-untyped-call]
    except Exception as error:  # transformers may raise any error
        raise UserError(
            f"the model in {source} cannot be built ({reason(error)}); expected a causal language model of transformers"
        ) from error
    stored = SafeReader(source).read_metadata().state_dict_metadata
    if any(name.startswith("model.") and ".parametrizations." in name for name in stored):
        split_fused(model)
    use_stored_dtypes(model, stored)
    targets = {f"model.{name}": value for name, value in weights_of(model)}
    check_model(source, targets, stored)
    load(targets, storage_reader=SafeReader(source), no_dist=True)
    with storing(out):
        merge_fused(model).save_pretrained(out)
