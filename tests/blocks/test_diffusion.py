"""Diffusion Transformers: what scales and shifts their norms is known by function, and so are their attentions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwise_lr.blocks import Block, classify, split_fused
from support.by_function import moved_by, problems
from support.conditioning import modulating
from support.handwritten_diffusion import ReferenceDiT
from support.proofs import vary

pytestmark = pytest.mark.filterwarnings("ignore")


def dit() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import DiTTransformer2DModel

    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "num_layers": 2,
        "sample_size": 8,
    }
    model = DiTTransformer2DModel(**sizes, patch_size=2, num_embeds_ada_norm=10)
    inputs = {"timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}
    return model, {"hidden_states": torch.randn(2, 4, 8, 8), **inputs}


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    widths = {
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 10,
        "out_channels": 4,
    }
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,), **widths,
    )  # fmt: skip
    inputs = {"timestep": torch.tensor([3, 7]), "pooled_projections": torch.randn(2, 10)}
    inputs["encoder_hidden_states"] = torch.randn(2, 5, 12)
    return model, {"hidden_states": torch.randn(2, 4, 8, 8), **inputs}


def flux() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    inputs = {"pooled_projections": torch.randn(2, 10), "timestep": torch.rand(2), "guidance": torch.rand(2)}
    inputs |= {"encoder_hidden_states": torch.randn(2, 6, 12), "txt_ids": torch.rand(6, 3)}
    return model, {"hidden_states": torch.randn(2, 16, 4), "img_ids": torch.rand(16, 3), **inputs}


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import PixArtTransformer2DModel

    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
    }
    widths = {"cross_attention_dim": 16, "sample_size": 8, "patch_size": 2, "caption_channels": 12}
    inputs = {"encoder_hidden_states": torch.randn(2, 5, 12), "timestep": torch.tensor([3, 7])}
    inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    model = PixArtTransformer2DModel(**sizes, **widths, norm_type="ada_norm_single")
    return model, {"hidden_states": torch.randn(2, 4, 8, 8), **inputs}


def reference() -> tuple[nn.Module, dict[str, Any]]:
    inputs = {"timestep": torch.tensor([3.0, 7.0]), "labels": torch.tensor([1, 2])}
    return ReferenceDiT(), {"latents": torch.randn(2, 4, 8, 8), **inputs}


Built = Callable[[], tuple[nn.Module, dict[str, Any]]]


@pytest.mark.parametrize("build", [reference, dit, sd3, flux, pixart], ids=lambda build: build.__name__)
def test_what_scales_and_shifts_norms_is_other_and_attention_is_as_autograd_says(build: Built) -> None:
    if build is not reference:
        pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model, inputs = build()
    split_fused(vary(model.eval()))
    blocks = classify(model)
    assert set(blocks) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def run() -> Tensor:
        found = model(**inputs)
        return found if isinstance(found, Tensor) else found[0]

    proof = moved_by(model, blocks, run)
    assert proof.attentions
    # Of the parameters that move a norm's scales, some are in the stream that an attention reads in a later layer.
    assert [each for each in problems(blocks, proof) if "is other" not in each] == []

    moved = modulating(model, run)
    assert moved
    says = {name for name in blocks if "scales and shifts of norms" in blocks.reason(name)}
    assert says
    assert says <= moved
    assert {blocks[name] for name in says} == {Block.OTHER}
    conditioning = {name for name in blocks if "conditioning" in blocks.reason(name)}
    assert moved <= conditioning | {name for name, block in blocks.items() if block is Block.EMB}
    assert {blocks[name] for name in conditioning} == {Block.OTHER}
    assert Block.HEAD in blocks.counts()
