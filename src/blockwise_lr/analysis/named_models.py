"""Find the model that a command names: a preset, a run, one checkpoint, or a Hugging Face model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockwise_lr.analysis.hub_models import from_hub, is_masked, model_loader
from blockwise_lr.blocks import Block
from blockwise_lr.checkpoints.manifest import (
    LAYOUT,
    checkpoint_step,
    checkpoints,
    no_complete_checkpoint,
    problem_with,
)
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.vocabulary import holds_tokenizer
from blockwise_lr.errors import UserError
from blockwise_lr.files import check_name, reading
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.initial_rms import initial_scales_of
from blockwise_lr.train.presets import PRESETS, get_preset
from blockwise_lr.train.run_folder import CONFIG, holds_run, read_run_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WHAT_TO_NAME = ": name the folder of a run, of a checkpoint or of a Hugging Face model"
_CONTEXT, _BATCH_SIZE = 512, 4  # for models without a training configuration


@dataclass(frozen=True)
class NamedModel:
    """A model that a command names, at one training step or at several.

    Args:
        name: the name to show.
        out: default folder for measurements.
        data: default text to measure on.
        context: default window length in tokens.
        longest: the longest window that the model takes; None if there is no limit.
        batch_size: default number of windows per batch.
        vocab_size: number of rows of the embedding.
        masked: whether the model predicts masked tokens instead of next tokens.
        models: pairs of (training step or None, function that loads the model), earliest first.
        tokenizer: the model's tokenizer for other texts, as in `DataConfig.tokenizer`; None if it has none.
        run: the folder of the run that the model belongs to, if any.
        skipped: incomplete checkpoints that were skipped, with the reason.
        initial_scales: the scale of each block before training; None if the model is not a preset's or a run's.
    """

    name: str
    out: Path
    data: DataConfig
    context: int
    longest: int | None
    batch_size: int
    vocab_size: int
    masked: bool
    models: Sequence[tuple[int | None, Callable[[], PreTrainedModel]]]
    tokenizer: str | None = None
    run: Path | None = None
    skipped: Sequence[str] = ()
    initial_scales: Mapping[Block, float] | None = None


def find_named_model(model: str, *, seed: int) -> NamedModel:
    """Find the model that `model` names.

    Args:
        model: a preset's name; the folder of a run, of one checkpoint or of a Hugging Face model; or an id on the Hub.
        seed: seed of the initial weights of a preset.

    Raises:
        UserError: nothing has this name, or the model cannot be measured; the message says what was expected.
    """
    if model in PRESETS:
        return _preset(model, seed)
    check_name(model, "the model's folder")
    with reading(model):
        return _find(model, Path(model))


def _find(model: str, path: Path) -> NamedModel:
    if holds_run(path):
        return _run(path)
    if (path / LAYOUT).is_file():
        raise UserError(
            f"{path} is a sharded checkpoint; expected the folder of a run or of a Hugging Face model: first export "
            f"it, blockwise-lr export {shlex.quote(str(path))} --out NEW-FOLDER"
        )
    if re.fullmatch(r"checkpoint-\d+", path.resolve().name) and holds_run(path.resolve().parent):
        return _checkpoint(path)
    if not path.is_dir() and (path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model)):
        raise UserError(
            f"no folder {model}: expected the folder of a run, of a checkpoint or of a Hugging Face model, an id, "
            "or a preset"
        )
    if path.is_dir() and not (path / CONFIG).exists():
        inside = [p.name for p in checkpoints(path)]
        hint = f"; name one of its checkpoints, such as {path / inside[-1]}" if inside else ""
        raise UserError(f"{path} holds neither a run nor a model (no {CONFIG}){hint or _WHAT_TO_NAME}")
    return _hugging_face(model)


def _preset(name: str, seed: int) -> NamedModel:
    from blockwise_lr.train.build_model import build_model

    config = get_preset(name)
    return NamedModel(
        **_training_defaults(config),
        name=name,
        out=Path("runs") / f"sharpness-{name}",
        models=[(None, lambda: build_model(config.model, seed=seed))],
        tokenizer=config.data.tokenizer,
    )


def _run(folder: Path) -> NamedModel:
    found = [(checkpoint, problem_with(checkpoint)) for checkpoint in checkpoints(folder)]
    complete = [checkpoint for checkpoint, problem in found if problem is None]
    skipped = [f"{checkpoint.name} is not complete ({problem})" for checkpoint, problem in found if problem]
    if not complete:
        raise no_complete_checkpoint(folder, skipped)
    config = read_run_config(folder)
    return NamedModel(
        **_training_defaults(config),
        name=folder.resolve().name,
        out=folder / "sharpness",
        models=[(checkpoint_step(each), model_loader(str(each), masked=False)) for each in complete],
        tokenizer=_tokenizer_of(config, complete[-1]),
        run=folder,
        skipped=skipped,
    )


def _checkpoint(folder: Path) -> NamedModel:
    if problem := problem_with(folder):
        raise UserError(
            f"{folder} is not a complete checkpoint: {problem}; choose another checkpoint of the run"
        )
    folder = folder.resolve()
    run = folder.parent
    config = read_run_config(run)
    return NamedModel(
        **_training_defaults(config),
        name=f"{run.name}/{folder.name}",
        out=run / "sharpness" / folder.name,
        models=[(checkpoint_step(folder), model_loader(str(folder), masked=False))],
        tokenizer=_tokenizer_of(config, folder),
        run=run,
    )


def _hugging_face(name: str) -> NamedModel:
    from transformers import AutoConfig

    config = from_hub(name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=False))
    masked = from_hub(name, lambda: is_masked(config, name))
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and text.model_type in _OFFSET:
        longest -= text.pad_token_id + 1
    is_folder = Path(name).is_dir()
    return NamedModel(
        name=Path(name).resolve().name if is_folder else name,
        out=Path("runs") / f"sharpness-{Path(name).resolve().name if is_folder else name.replace('/', '-')}",
        data=DataConfig(),
        context=min(longest or _CONTEXT, _CONTEXT),
        longest=longest,
        batch_size=_BATCH_SIZE,
        vocab_size=text.vocab_size,
        masked=masked,
        models=[(None, model_loader(name, masked=masked))],
        tokenizer=_tokenizer_in(Path(name)) if is_folder else name,
    )


# Model types whose positions start after the padding token's id, which shortens their longest window by that many.
_OFFSET = {
    "roberta",
    "roberta-prelayernorm",
    "xmod",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "esm",
}


def _tokenizer_in(folder: Path) -> str | None:
    return str(folder) if holds_tokenizer(folder) else None


def _tokenizer_of(config: TrainConfig, checkpoint: Path) -> str | None:
    """Return the tokenizer for other texts. One that was trained on the run's text is stored in its checkpoints."""
    return _tokenizer_in(checkpoint) if config.data.tokenizer == "bpe" else config.data.tokenizer


def _training_defaults(config: TrainConfig) -> dict[str, Any]:
    model = config.model
    return {
        "data": config.data, "context": model.context, "longest": model.context, "batch_size": config.batch_size,
        "vocab_size": model.vocab_size, "masked": False, "initial_scales": initial_scales_of(model),
    }  # fmt: skip
