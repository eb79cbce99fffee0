"""timm's vision models, where timm is installed: claimed completely, attention by function."""

from __future__ import annotations

import pytest
import torch

from blockwise_lr.blocks import classify, split_fused
from support.by_function import moved_by, problems
from support.vision import import_timm

ATTENTIONS = {
    "vit_tiny_patch16_224": 12,
    "deit_tiny_distilled_patch16_224": 12,
    "deit3_small_patch16_224": 12,
    "swin_tiny_patch4_window7_224": 12,
    "swinv2_tiny_window8_256": 12,
    "eva02_tiny_patch14_224": 12,
    "vit_base_patch16_siglip_224": 13,
    "vit_small_patch16_dinov3": 12,
    "convnext_tiny": 0,
    "convnextv2_atto": 0,
    "mixer_s32_224": 0,
    "maxvit_tiny_tf_224": 22,
    "cait_xxs24_224": 26,
    "levit_128s": 11,
    "hiera_tiny_224": 12,
    "mvitv2_tiny": 10,
    "crossvit_tiny_240": 21,
}
# What scales or mixes the scores, and the one query of a pooling attention, which is no projection.
MOVES_SCORES = ("attn.logit_scale is other", "attn_pool.latent is other", "attn.proj_l.weight is other")


QUICK = ("deit_tiny_distilled_patch16_224", "convnextv2_atto", "levit_128s")
CASES = [
    pytest.param(*case, marks=() if case[0] in QUICK else pytest.mark.slow, id=case[0])
    for case in ATTENTIONS.items()
]


@pytest.mark.parametrize(("name", "attentions"), CASES)
def test_every_parameter_is_claimed_and_attention_is_as_autograd_says(name: str, attentions: int) -> None:
    timm = import_timm()
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if (parameter == parameter.flatten()[0]).all():
                parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(1, *model.default_cfg["input_size"])
    with torch.no_grad():
        before = model(images)
        split_fused(model)
        assert torch.equal(model(images), before)
    blocks = classify(model)
    assert set(blocks) == {name for name, _ in model.named_parameters()}
    proof = moved_by(model, blocks, lambda: model(images))
    assert [each for each in problems(blocks, proof) if not any(name in each for name in MOVES_SCORES)] == []
    assert len(proof.attentions) == attentions
