"""The precision of fp32 products is set for a while, and is then as it was, whatever it was set by."""

from __future__ import annotations

import itertools

import pytest
import torch

from blockwise_lr.fp32 import Fp32Settings, fp32_precision, kept_fp32_precision

BACKENDS = torch.backends
SETTINGS = {
    "nothing": lambda: None,
    "all tf32": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),  # as transformers does
    "all ieee": lambda: setattr(BACKENDS, "fp32_precision", "ieee"),
    "allow_tf32": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),  # as accelerate does
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "cudnn off": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "conv ieee": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
    "matmul tf32": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "mkldnn bf16": lambda: setattr(BACKENDS.mkldnn, "fp32_precision", "bf16"),
}


def read(getter):
    try:
        return getter()
    except RuntimeError:  # torch's, of settings that are at odds
        return "mixed"


def everything():
    nodes = [BACKENDS, BACKENDS.cuda.matmul, BACKENDS.cudnn, BACKENDS.mkldnn]
    nodes += [getattr(BACKENDS.cudnn, name) for name in ("conv", "rnn")]
    nodes += [getattr(BACKENDS.mkldnn, name) for name in ("matmul", "conv", "rnn")]
    return [
        *[node.fp32_precision for node in nodes],
        read(lambda: BACKENDS.cuda.matmul.allow_tf32),
        read(lambda: BACKENDS.cudnn.allow_tf32),
        read(torch.get_float32_matmul_precision),
    ]


@pytest.fixture(autouse=True)
def _as_before():
    with kept_fp32_precision():
        yield


@pytest.mark.parametrize(("first", "second"), list(itertools.product(SETTINGS, SETTINGS)))
def test_settings_of_every_kind_are_as_they_were_afterwards(first, second):
    SETTINGS[first]()
    SETTINGS[second]()
    before = everything()
    for precision in ("ieee", "tf32"):
        with fp32_precision(precision):
            tf32 = precision == "tf32"
            assert BACKENDS.cuda.matmul.allow_tf32 is BACKENDS.cudnn.allow_tf32 is tf32
            assert (BACKENDS.cuda.matmul.fp32_precision == "tf32") is tf32
            assert (BACKENDS.cudnn.conv.fp32_precision == "tf32") is tf32
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert everything() == before
    assert Fp32Settings.now() == Fp32Settings.now()
    with kept_fp32_precision():
        BACKENDS.fp32_precision = "ieee"
        followed = everything()
    assert everything() == before
    BACKENDS.fp32_precision = "ieee"  # what follows its parent still does
    assert everything() == followed


def test_an_error_restores_them_too():
    torch.set_float32_matmul_precision("high")
    with pytest.raises(KeyboardInterrupt), fp32_precision("ieee"):
        raise KeyboardInterrupt
    assert torch.get_float32_matmul_precision() == "high"
