"""Check the experiment trackers of a run (``--report-to``) before the run begins."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from blockwise_lr.errors import UserError
from blockwise_lr.extras import is_installed, missing
from blockwise_lr.reason import reason

_WITHOUT_ACCOUNT = ("offline", "dryrun", "disabled")


def check_trackers(names: Iterable[str]) -> None:
    """Check that a run can report to its trackers.

    Args:
        names: the names that ``--report-to`` lists.

    Raises:
        UserError: transformers does not know a tracker, its package is missing, or Weights & Biases has no login.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(
                f"--report-to: transformers cannot report to {name!r}; it knows {known} (or none)"
            )
        if name == "tensorboard" and not is_installed("tensorboard") and not is_installed("tensorboardX"):
            needed = missing("--report-to tensorboard needs", "tensorboard", "train")
            raise UserError(f"{needed}, or leave it out with --report-to none")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise UserError(f"--report-to {name}: {error}") from None
        if name == "wandb" and not _wandb_is_ready():
            raise UserError(
                "--report-to wandb needs a login to Weights & Biases, and there is none: run `wandb login`, or set "
                "WANDB_MODE=offline to keep the logs on this machine"
            )


def _wandb_is_ready() -> bool:
    """Return whether wandb can start without a prompt: it has a key, or its mode needs none."""
    if os.environ.get("WANDB_MODE", "").lower() in _WITHOUT_ACCOUNT or os.environ.get("WANDB_API_KEY"):
        return True
    import wandb  # type: ignore[import-not-found,unused-ignore]

    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False))
    return bool(wandb.api.api_key)  # older releases have no `prompt`


def report_failures(trainer: Trainer) -> None:
    """Make errors of a tracker that cannot start (no network, no account) a UserError that names the tracker.

    Args:
        trainer: the trainer of a run, before ``train()``.
    """
    names = {callback: name for name, callback in INTEGRATION_TO_CALLBACK.items()}
    for callback in trainer.callback_handler.callbacks:
        if (name := names.get(type(callback))) is not None:
            callback.on_train_begin = _explained(callback.on_train_begin, name)


def _explained(start: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(start)
    def explained(*args: Any, **kwargs: Any) -> Any:
        try:
            return start(*args, **kwargs)
        except Exception as error:  # each tracker raises its own classes
            raise UserError(
                f"--report-to {name} could not start ({reason(error)}): mend that, or leave it out with "
                "--report-to none"
            ) from error

    return explained
