"""Build the model of `blockwise-lr inspect MODEL` on the meta device, without its weights."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from blockwise_lr.analysis.hub_models import from_hub
from blockwise_lr.errors import UserError
from blockwise_lr.files import reading
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig, config_from_dict
from blockwise_lr.train.presets import PRESETS
from blockwise_lr.train.run_folder import CONFIG, holds_run, read_configuration, read_run_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def model_to_inspect(name: str, *, trust_remote_code: bool = False) -> nn.Module:
    """Build a model on the meta device. Only its configuration is read, not its weights.

    Args:
        name: a preset; the folder of a run or its config.json; the folder or id of a Hugging Face model or its
            config.json; or ``module:function``, where the function returns the model (or is the model itself).
        trust_remote_code: allow a Hugging Face model to run the code in its repository.

    Raises:
        UserError: nothing has this name, or the model cannot be built; the message says what was expected.

    Example:
        >>> type(model_to_inspect("quickstart")).__name__
        'LlamaForCausalLM'
    """
    if name in PRESETS:
        return _ours(PRESETS[name].model)
    with reading(name):
        return _found(Path(name), name, trust_remote_code)


def _found(path: Path, name: str, trust_remote_code: bool) -> nn.Module:
    if holds_run(path):
        return _ours(read_run_config(path).model)
    if path.suffix.lower() == ".json" and (values := read_configuration(path)).keys() & {"model", "train"}:
        return _ours(config_from_dict(values.get("train", values)).model)
    if ":" in name and not path.exists():
        return _from_user_code(name)
    return _hugging_face(path.parent if path.name == CONFIG else path, name, trust_remote_code)


def _ours(config: ModelConfig) -> nn.Module:
    with torch.device("meta"):
        return build_model(config, seed=0)


def _from_user_code(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, "")  # search the current folder too, as `python -m` does
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # the user's module may raise any error
        raise UserError(f"{name}: {error}; expected module:function, such as mymodels.gpt:build") from None
    finally:
        sys.path.remove("")
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise UserError(
                f"{name} is a {type(found).__name__}; expected a model, or a function that returns one"
            )
        try:
            with torch.device("meta"):
                found = found()
        except (Exception, SystemExit) as error:  # the user's function may raise any error
            raise UserError(f"{name}() raised {type(error).__name__}: {error}") from error
    if not isinstance(found, nn.Module):
        raise UserError(f"{name}() returned a {type(found).__name__}; expected a torch.nn.Module")
    return found


def _hugging_face(path: Path, name: str, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoConfig

    if path.is_dir() and not (path / CONFIG).exists():
        raise UserError(
            f"{path} holds neither a run nor a model (no {CONFIG}): name a folder with one, a preset, or "
            "module:function"
        )
    where = str(path) if path.is_dir() else name
    config = from_hub(where, lambda: AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code))
    with torch.device("meta"):
        model: nn.Module = from_hub(where, lambda: _from_hf_config(config, trust_remote_code))
    return model


def _from_hf_config(config: PretrainedConfig, trust_remote_code: bool) -> Any:
    """Build the class that the configuration names; without one, a causal language model, or else the body alone."""
    import transformers

    for architecture in config.architectures or ():
        if (kind := getattr(transformers, architecture, None)) is not None:
            return kind._from_config(config)
    causal: Any = transformers.AutoModelForCausalLM
    body: Any = transformers.AutoModel
    try:
        model = causal.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError:
        model = body.from_config(config, trust_remote_code=trust_remote_code)
    return model
