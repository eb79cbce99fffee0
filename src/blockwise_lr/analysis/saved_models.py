"""Find a saved model and its tokenizer, for `eval` and `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blockwise_lr.analysis.named_models import NamedModel, find_named_model
from blockwise_lr.checkpoints.manifest import MANIFEST, problem_with
from blockwise_lr.data.vocabulary import Encoder, end_of_text_id, holds_tokenizer, load_tokenizer
from blockwise_lr.errors import UserError
from blockwise_lr.files import reading
from blockwise_lr.train.run_folder import holds_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def find_model(path: Path) -> tuple[NamedModel, Path, int | None]:
    """Find the model in a folder.

    Args:
        path: folder of a run (its newest complete checkpoint is used), of a checkpoint or of a Hugging Face model.

    Returns:
        The model, the folder it is stored in, and the training step it was saved at (None for a plain Hugging Face
        folder).

    Raises:
        UserError: the folder does not exist or cannot be read, or holds no complete checkpoint or no causal language
            model.
    """
    with reading(path):
        return _find(path)


def _find(path: Path) -> tuple[NamedModel, Path, int | None]:
    if not path.is_dir():
        raise UserError(
            f"no folder {path}: expected a run's folder (train --out), one of its checkpoint-* folders, or that of a "
            "Hugging Face model"
        )
    if (path / MANIFEST).exists() and (
        problem := problem_with(path)
    ):  # also for a checkpoint outside its run
        raise UserError(
            f"{path} is not a complete checkpoint: {problem}; choose another checkpoint of the run"
        )
    # The full path is needed because a folder may have the name of a preset.
    named = find_named_model(str(path.resolve()), seed=0)
    if named.masked:
        raise UserError(f"{path} predicts masked tokens; expected a causal language model (...ForCausalLM)")
    step = named.models[-1][0]
    return named, path / f"checkpoint-{step}" if holds_run(path) else path, step


def tokenizer_of(named: NamedModel, folder: Path, given: str | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model.

    Args:
        named: the model.
        folder: the folder it is stored in.
        given: id or folder of a tokenizer to use instead of the model's own.

    Returns:
        The `given` tokenizer, otherwise the one in the model's folder, otherwise that of its run.

    Raises:
        UserError: there is no tokenizer, it cannot be loaded, or it has more tokens than the model.
    """
    name = given or (str(folder) if holds_tokenizer(folder) else named.tokenizer)
    if name is None:
        raise UserError(
            f"{folder} comes without a tokenizer (tokenizer.json): name the one it was trained with, "
            "--tokenizer FOLDER-or-id"
        )
    try:
        return load_tokenizer(name, named.vocab_size)
    except UserError as error:  # these commands have no --vocab-size to set
        raise UserError(str(error).partition(": set --vocab-size")[0]) from None


def encoder_of(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    """Return an encoder of documents for the tokenizer."""
    return Encoder(tokenizer.backend_tokenizer, end_of_text_id(tokenizer, str(tokenizer.name_or_path)))


def first_token(named: NamedModel, tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the token before each document: the end-of-text token for runs, otherwise the bos token, if any."""
    bos = tokenizer.bos_token_id
    if named.run is None and bos is not None:
        return int(bos)
    return end_of_text_id(tokenizer, str(tokenizer.name_or_path))
