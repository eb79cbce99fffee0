"""Bits per byte: what is counted, held against closed forms and against one prediction at a time."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from blockwise_lr.analysis.text_loss import document_windows, text_loss, token_bytes
from blockwise_lr.data.vocabulary import Encoder, train_bpe
from blockwise_lr.errors import UserError
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig

DOCUMENTS = [
    "the state of the union, naïve and 日本語 at once " * 3,
    "",
    "€",
    "a second document <|endoftext|> that is longer than one window of sixteen tokens is",
    "peace",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(DOCUMENTS * 3, 290)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer, end_of_text=0)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig("gpt2", 32, 2, 2, vocab_size=290, context=16, tied=True)
    built = build_model(config, seed=0)
    with torch.no_grad():  # initial weights would predict nearly the same everywhere
        for parameter in built.parameters():
            parameter.mul_(4)
    return built


@torch.no_grad()
def one_at_a_time(model, encoder, documents, context, overlap):
    """nats, tokens and bytes by as many forward passes as there are tokens, each told what it may read."""
    nats = tokens = n_bytes = 0
    for text in documents:
        ids = encoder.encode([text])[0].tolist()[:-1]
        stream = [encoder.end_of_text, *ids]
        for i in range(len(ids)):
            # Which window predicts token i, where that window starts to read, by counting windows from the start.
            stride = context - overlap
            later = 0 if i < context else 1 + (i - context) // stride
            end = min(len(ids), context + later * stride)
            read = stream[max(0, end - context) : i + 1]
            logits = model.double()(torch.tensor([read])).logits[0, -1]
            nats -= float(logits.log_softmax(0)[ids[i]])
        tokens += len(ids)
        n_bytes += len(text.encode())
    model.float()
    return nats, tokens, n_bytes


@pytest.mark.parametrize(("context", "overlap"), [(16, 0), (16, 5), (16, 15), (7, 3), (1, 0)])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_it_is_the_sum_of_one_prediction_at_a_time(model, encoder, context, overlap, batch_size):
    nats, tokens, n_bytes = one_at_a_time(model, encoder, DOCUMENTS, context, overlap)
    found = text_loss(model, encoder, DOCUMENTS, context=context, overlap=overlap, batch_size=batch_size)
    assert (found.documents, found.tokens, found.bytes) == (4, tokens, n_bytes)
    assert n_bytes == len("".join(DOCUMENTS).encode())
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert found.loss == found.nats / tokens


def test_a_uniform_model_needs_the_logarithm_of_the_vocabulary_for_every_token():
    # 32 tokens of known lengths: words of 7 bytes, so 5 bits a word, and nothing for the end of a document.
    words = [f"word{i:02} " for i in range(31)]
    vocabulary = Tokenizer(models.WordLevel({"<|endoftext|>": 0, **{w: i for i, w in enumerate(words, 1)}}))
    vocabulary.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")

    class Uniform(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, input_ids):
            return SimpleNamespace(logits=self.scale * torch.full((*input_ids.shape, 32), 3.0))

    documents = ["".join(words[:20]), "".join(words[::-1]), "", words[3]]
    found = text_loss(Uniform(), Encoder(vocabulary, 0), documents, context=8)
    assert (found.documents, found.tokens, found.bytes) == (3, 52, 52 * 7)
    assert found.loss == pytest.approx(math.log(32), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(5 / 7, rel=1e-6)


def test_it_leaves_the_model_in_the_mode_it_was_in(model, encoder):
    text_loss(model.train(), encoder, DOCUMENTS, context=16)
    assert model.training
    text_loss(model.eval(), encoder, DOCUMENTS, context=16)
    assert not model.training


def test_more_overlap_predicts_the_same_tokens_from_at_least_as_much(encoder):
    ids = np.arange(1, 60)
    for overlap in range(8):
        read = {}
        for window in document_windows(ids, 0, 8, overlap):
            assert len(window.inputs) <= 8
            first = len(window.inputs) - len(window.targets)
            for i, target in enumerate(window.targets):
                assert window.inputs[first + i] == target - 1  # the token before it
                read[int(target)] = first + i + 1
        assert sorted(read) == list(range(1, 60))
        assert min(read[t] for t in range(9, 60)) > overlap


def test_no_text_and_bad_overlaps_are_refused(model, encoder):
    with pytest.raises(UserError, match="there is no text in any of the documents: nothing to predict"):
        text_loss(model, encoder, ["", ""], context=16)
    with pytest.raises(UserError, match="--overlap is 16; expected 0 or more and less than the context, 16"):
        text_loss(model, encoder, DOCUMENTS, context=16, overlap=16)


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=40))
def test_the_bytes_of_byte_level_tokens_are_those_of_the_text(text):
    lengths = token_bytes(_FAST)
    ids = Encoder(_FAST.backend_tokenizer, 0).encode([text])[0]
    assert lengths[ids].sum() == len(text.encode())  # the end-of-text token among them stands for none


def test_tokens_added_as_text_count_their_bytes_and_special_ones_none():
    fast = PreTrainedTokenizerFast(tokenizer_object=train_bpe(DOCUMENTS, 280), eos_token="<|endoftext|>")
    fast.add_tokens(["日本"])
    fast.add_special_tokens({"pad_token": "<pad>"})
    lengths = token_bytes(fast)
    assert lengths[fast.convert_tokens_to_ids("日本")] == 6
    assert lengths[fast.pad_token_id] == lengths[fast.eos_token_id] == 0


def test_a_tokenizer_that_is_not_byte_level_says_nothing_about_bytes():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=words)) is None
    words.decoder = decoders.Sequence([decoders.Metaspace()])
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=words)) is None


_FAST = PreTrainedTokenizerFast(tokenizer_object=train_bpe(DOCUMENTS, 290), eos_token="<|endoftext|>")
