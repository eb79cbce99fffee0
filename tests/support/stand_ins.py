"""Stand-ins for packages that a trainer imports and that the tested part of it does not use."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """Put an empty module in the place of a package, unless the package is installed."""
    if name in sys.modules or ("." not in name and importlib.util.find_spec(name) is not None):
        return
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


def prepare_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, str, dict[str, Any]]]:
    """Make Trainer find bitsandbytes, unless it is installed; return the list of its overrides for modules."""

    class Bits(torch.optim.SGD):
        def __init__(self, params: Any, lr: float, **_: Any) -> None:
            super().__init__(params, lr)

    class GlobalOptimManager:
        def __init__(self) -> None:
            self.module_weight_config_triple: list[tuple[Any, str, dict[str, Any]]] = []

        def register_module_override(self, module: Any, name: str, config: dict[str, Any]) -> None:
            self.module_weight_config_triple.append((module, name, config))

        @classmethod
        def get_instance(cls) -> GlobalOptimManager:
            return manager

    manager = GlobalOptimManager()
    names = ("AdamW", "Lion", "RMSprop", "AdEMAMix")
    classes = {name: type(name, (Bits,), {"__module__": "bitsandbytes.optim"}) for name in names}
    optim = types.SimpleNamespace(GlobalOptimManager=GlobalOptimManager)
    stand_in(monkeypatch, "bitsandbytes", optim=optim)
    stand_in(monkeypatch, "bitsandbytes.optim", **classes)
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: True)
    used = importlib.import_module("bitsandbytes").optim.GlobalOptimManager.get_instance()
    monkeypatch.setattr(used, "module_weight_config_triple", [])
    overrides: list[tuple[Any, str, dict[str, Any]]] = used.module_weight_config_triple
    return overrides


def prepare_fairseq2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make fairseq2 importable without its compiled part and its logger; skip the test if it is not installed.

    The compiled part is bound to one version of torch. Weights & Biases is only logged to.
    """
    for needed in ("fairseq2", "ruamel.yaml", "importlib_resources", "torcheval", "clusterscope", "tiktoken"):
        if not _is_there(needed):
            pytest.skip(f"{needed} is not installed")
    import accelerate  # noqa: F401 - before the stand-in, for which it would look

    compiled = types.ModuleType("fairseq2n")
    compiled.DOC_MODE = True
    monkeypatch.setitem(sys.modules, "fairseq2n", compiled)
    stand_in(monkeypatch, "wandb", Run=object)


def prepare_olmo_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make OLMo-core importable without the package that downloads its data; skip the test if it is not installed."""
    for needed in ("olmo_core", "dataclass_extensions", "bettermap"):
        if not _is_there(needed):
            pytest.skip(f"{needed} is not installed")
    client = type("Client", (), {"recoverable_errors": ()})
    schemes = {"S3Client": client, "SchemeClient": client, "add_scheme_client": None}
    if not _is_there("cached_path"):
        stand_in(monkeypatch, "cached_path", cached_path=None)
        stand_in(monkeypatch, "cached_path.schemes", **schemes)


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
