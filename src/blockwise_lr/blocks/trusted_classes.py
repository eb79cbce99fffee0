"""The attention classes whose fused weights have a known layout.

For these classes the layout in `blocks/known_layouts.py` counts, or else all of the first part, then all of the next.
The layout of any other class is stated by the user or shown by a run (`blocks/resolved_layouts.py`).
"""

from __future__ import annotations

import re

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

# Model folders of transformers 5.23. Tests prove the layouts of the language models by running them. The layouts of the
# image and speech models were read in their source.
_TRANSFORMERS = re.compile(
    r"transformers\.models\.(axk[12]|bailing_hybrid|blip|blip_2|bloom|codegen|cohere_compass|dbrx|deberta"
    r"|decision_transformer|deepseek_ocr2|deepseek_v([234]|32)|dots3_note|ernie4_5_vl_moe|evolla|exaone4_5|falcon"
    r"|florence2|glm4_moe_lite|glm4v|glm4v_moe|glm5_next|glm_image|glm_moe_dsa|glm_ocr|got_ocr2|gpt2|gpt_bigcode|gpt_neox"
    r"|gpt_neox_japanese|granite_speech|granite_speech_plus|hiera|hy_v4|imagegpt|instructblip|instructblipvideo|jetmoe"
    r"|kimi_linear|longcat_flash|mgp_str|minicpm3|minimax|modernbert|mpt|openai|persimmon|phi3|phi4_multimodal"
    r"|pp_formulanet|pp_ocrv5_mobile_rec|pp_ocrv5_server_rec|pp_ocrv6_small_rec|qwen2_5_vl|qwen2_vl|qwen3_5|qwen3_5_moe"
    r"|qwen3_next|qwen3_omni_moe|qwen3_vl|qwen3_vl_moe|qwen4_exp|sam|sam2|sam_hq|seggpt|slanext|timesformer"
    r"|unlimited_ocr|vitdet|youtu)\..*"
)
_CLASSES = re.compile(
    r"timm\.layers\.attention\.Attention|timm\.layers\.attention_pool\.AttentionPoolLatent"
    r"|timm\.models\.(vision_transformer|beit)\.Attention|timm\.models\.swin_transformer(_v2)?\.WindowAttention"
    r"|timm\.models\.eva\.EvaAttention|litgpt\.model\.CausalSelfAttention"
)


def is_trusted(attention: nn.Module) -> bool:
    """Return whether the layouts of an attention's class are known, and its forward is the original one.

    The class that counts is the one that defines `forward`: a subclass that overrides it may use another layout.
    """
    if isinstance(attention, nn.MultiheadAttention):
        return True
    of_class = type_before_parametrizations(attention)
    owner = next((cls for cls in of_class.__mro__ if "forward" in vars(cls)), of_class)
    forward = vars(owner).get("forward", owner)
    # accelerate replaces `forward` on the instance and keeps the original as `_old_forward`.
    own = attention.__dict__.get("_old_forward", attention.__dict__.get("forward", forward))
    if forward.__module__ != owner.__module__ or getattr(own, "__func__", own) is not forward:
        return False
    name = f"{owner.__module__}.{owner.__qualname__}"
    return any(names.fullmatch(name) for names in (_TRANSFORMERS, _CLASSES))
