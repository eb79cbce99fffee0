"""Detect on the stack whether code runs inside the forward pass of a module."""

from __future__ import annotations

import sys
from itertools import chain
from types import CodeType, FrameType

from torch import nn

# in_forward() looks for the call of a module on the stack.
_CALL: CodeType = nn.Module._call_impl.__code__
_INSIDE_CALL = {constant for constant in _CALL.co_consts if isinstance(constant, CodeType)}


def in_forward() -> bool:
    """Return whether the caller's caller is inside a module's forward pass, where weights are only read.

    A hook that runs before or after a forward pass counts as outside.
    """
    frame: FrameType | None = sys._getframe(2)
    callee: FrameType | None = None
    while frame is not None:
        if frame.f_code is _CALL:
            return callee is None or callee.f_code.co_name == "forward" or not _is_hook(callee, frame)
        if frame.f_code not in _INSIDE_CALL:
            callee = frame
        frame = frame.f_back
    return False


def _is_hook(callee: FrameType, call: FrameType) -> bool:
    module = call.f_locals["self"]
    hooks = chain(module._forward_pre_hooks.values(), module._forward_hooks.values())
    return any(getattr(hook, "__code__", None) is callee.f_code for hook in hooks)
