"""A model that was saved, for `eval` and `generate`: the folder it is in, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blockwise_lr.analysis.named_models import Subject, find_subject
from blockwise_lr.checkpoints.manifest import MANIFEST, problem_with
from blockwise_lr.data.vocabulary import Encoder, end_of_text_id, holds_tokenizer, load_tokenizer
from blockwise_lr.errors import UserError
from blockwise_lr.train.run_folder import holds_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def find_model(path: Path) -> tuple[Subject, Path, int | None]:
    """The model in `path`, its own folder, and the step it was saved at (None for a plain Hugging Face folder).

    Args:
        path: folder of a run (its newest whole checkpoint is taken), of a checkpoint or of a Hugging Face model.

    Raises:
        UserError: no such folder, no whole checkpoint, no causal language model.
    """
    if not path.is_dir():
        raise UserError(
            f"no folder {path}: expected a run's folder (train --out), one of its checkpoint-* folders, or that of a "
            "Hugging Face model"
        )
    if (path / MANIFEST).exists() and (problem := problem_with(path)):  # also where its run is not beside it
        raise UserError(f"{path} is not whole: {problem}; choose another checkpoint of the run")
    subject = find_subject(str(path.resolve()), seed=0)  # whole, or a folder may be named like a preset
    if subject.masked:
        raise UserError(f"{path} predicts masked tokens; expected a causal language model (...ForCausalLM)")
    step = subject.models[-1][0]
    return subject, path / f"checkpoint-{step}" if holds_run(path) else path, step


def tokenizer_of(subject: Subject, folder: Path, given: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a model: the `given` one (id or folder), else that in its folder, else its run's.

    Raises:
        UserError: there is none, it cannot be loaded, or it has more tokens than the model.
    """
    name = given or (str(folder) if holds_tokenizer(folder) else subject.tokenizer)
    if name is None:
        raise UserError(
            f"{folder} comes without a tokenizer (tokenizer.json): name the one it was trained with, "
            "--tokenizer FOLDER-or-id"
        )
    try:
        return load_tokenizer(name, subject.vocab_size)
    except UserError as error:  # there is no --vocab-size here
        raise UserError(str(error).partition(": set --vocab-size")[0]) from None


def encoder_of(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    """The tokenizer, ready to encode documents."""
    return Encoder(tokenizer.backend_tokenizer, end_of_text_id(tokenizer, str(tokenizer.name_or_path)))


def first_token(subject: Subject, tokenizer: PreTrainedTokenizerFast) -> int:
    """What documents begin behind: in our runs the end of the one before, elsewhere the bos token if there is one."""
    bos = tokenizer.bos_token_id
    if subject.run is None and bos is not None:
        return int(bos)
    return end_of_text_id(tokenizer, str(tokenizer.name_or_path))
