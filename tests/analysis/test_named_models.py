"""Models as commands name them: what is read from a configuration, held against the model itself."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from blockwise_lr.analysis.named_models import find_named_model


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("bert", {}),
        ("camembert", {}),
        ("data2vec-text", {}),
        ("ibert", {}),
        ("luke", {"entity_vocab_size": 10, "entity_emb_size": 8}),
        ("mpnet", {}),
        ("roberta", {}),
        ("roberta-prelayernorm", {}),
        ("xlm-roberta", {}),
        ("xmod", {"languages": ["en_XX"], "default_language": "en_XX"}),
    ],
)
def test_the_longest_window_is_the_longest_that_the_model_takes(tmp_path, kind: str, more: dict[str, Any]):
    """Positions of RoBERTa and its kin start after the padding token's id."""
    config = AutoConfig.for_model(
        kind, vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=12, pad_token_id=1, **more,
    )  # fmt: skip
    model = AutoModelForMaskedLM.from_config(config).eval()
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    longest = find_named_model(str(tmp_path), seed=0).longest
    assert longest is not None
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))
