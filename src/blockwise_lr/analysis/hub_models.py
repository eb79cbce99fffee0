"""Load models from Hugging Face folders and from the Hub, with one-line errors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blockwise_lr.errors import UserError
from blockwise_lr.reason import reason
from blockwise_lr.train.run_folder import CONFIG

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def is_masked(config: PretrainedConfig, name: str) -> bool:
    """Return True for a masked language model and False for a causal one.

    Raises:
        UserError: the model is neither.
    """
    from transformers.models.auto import modeling_auto

    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    bodies = modeling_auto.MODEL_MAPPING_NAMES
    kind = config.model_type
    architecture = next(iter(config.architectures or ()), bodies.get(kind))
    if architecture == bodies.get(kind) and kind in {*masked, *causal}:
        # The body without a head. If the head is not tied to the embedding, the loader reports it as missing.
        return kind in masked
    if architecture == masked.get(kind):
        return True
    if architecture == causal.get(kind):
        return False
    raise UserError(
        f"{name} is a {architecture or kind}: expected a causal or a masked language model (...ForCausalLM, "
        "...ForMaskedLM); measure others from Python, with measure_sharpness"
    )


def model_loader(name: str, *, masked: bool) -> Callable[[], PreTrainedModel]:
    """Return a function that loads a model in fp32.

    The function raises UserError if the model cannot be loaded, or if the file lacks some of its weights.

    Args:
        name: a folder, or an id on the Hub.
        masked: whether to load a masked language model instead of a causal one.
    """

    def load() -> PreTrainedModel:
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

        auto: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        model, info = from_hub(
            name,
            lambda: auto.from_pretrained(
                name,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # otherwise transformers does not name the mismatched weights
            ),
        )
        for key, stored, expected in sorted(info["mismatched_keys"]):
            raise UserError(
                f"{name}: {key} has shape {tuple(stored)} in the file and {tuple(expected)} by {CONFIG}: they are of "
                "two models; get the folder again"
            )
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"{name} has no weights for {missing[0]} and {len(missing) - 1} others of {type(model).__name__}; "
                "expected all of them, because random ones would say nothing about the model: choose a folder that was "
                "saved from this class"
            )
        loaded: PreTrainedModel = model
        return loaded

    return load


def from_hub(name: str, load: Callable[[], Any]) -> Any:
    """Call `load`, which loads a model or a configuration, and report any error in one line.

    Args:
        name: the folder or id to name in the message.
        load: the function to call.

    Raises:
        UserError: `load` raised an error.
    """
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # hides its messages about retries; a failure is reported below
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # transformers and the network may raise any error
        what = (
            f"the model in {name}"
            if Path(name).is_dir()
            else f"{name!r} is no folder and no preset (`blockwise-lr presets` lists those); as a model it"
        )
        raise UserError(f"{what} cannot be loaded: {reason(error)}") from error
    finally:
        hub.setLevel(level)
