"""Sample text from a saved model."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from blockwise_lr.analysis.saved_models import encoder_of, find_model, first_token, tokenizer_of
from blockwise_lr.errors import UserError
from blockwise_lr.fp32 import fp32_precision
from blockwise_lr.train.build_model import LARGEST
from blockwise_lr.train.quiet import quiet_libraries
from blockwise_lr.train.ranges import check_seed

_DEFAULT_TOKENS = 100
_MIN_TEMPERATURE = 1e-6


@quiet_libraries()
@fp32_precision("ieee")
def generate(
    path: Path,
    prompt: str = "",
    *,
    tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    tokenizer: str | None = None,
    device: str = "cpu",
) -> str:
    """Return the prompt and its continuation, sampled in fp32 with transformers' ``generate``.

    Only the arguments decide how to sample. A generation_config.json in the model's folder is ignored: its top_p,
    number of beams or repetition penalty would change the distribution.

    The prompt is the beginning of a document. The model therefore first reads an end-of-text token, as in training;
    a model that is not from a run reads its bos token if it has one. Sampling stops at the end of the document. The
    first token, the prompt and the sample must fit into the model's context together; nothing is truncated.

    Args:
        path: folder of a run (its newest complete checkpoint is used), of a checkpoint or of a Hugging Face model.
        prompt: the text to continue; may be empty.
        tokens: largest number of tokens to sample. Default: 100, or as many as fit.
        temperature: the divisor of the logits. With 0, the likeliest token is always taken.
        top_k: sample from this many likeliest tokens; 0 for all tokens.
        seed: seed of the sampling. The global random state is not changed.
        tokenizer: id or folder of a Hugging Face tokenizer. Default: the model's own.
        device: the device to sample on.

    Returns:
        The text of the prompt and the sample.

    Raises:
        UserError: the model or its tokenizer is missing, the prompt is too long, or a setting is out of range.

    Example:
        >>> generate(Path("runs/mine"), "Fellow citizens", tokens=20, top_k=50)  # doctest: +SKIP
        'Fellow citizens of the Senate and of the House of Representatives: ...'
    """
    from transformers import GenerationConfig

    for name, value, least in (("tokens", tokens, 1), ("top-k", top_k, 0)):
        if value is not None and not least <= value <= LARGEST:
            more = f", {LARGEST} at most" if value > LARGEST else ""
            raise UserError(f"--{name} is {value}; expected {least} or more{more}")
    check_seed(seed, "--seed")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"--temperature is {temperature}; expected a finite number, 0 or more")
    if 0 < temperature < _MIN_TEMPERATURE:  # dividing the logits by less would overflow
        raise UserError(
            f"--temperature is {temperature}; expected 0 (the likeliest token), or {_MIN_TEMPERATURE} or more"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError:  # the command line held bytes that are not valid UTF-8
        raise UserError(f"--prompt {prompt!a} is not UTF-8 text: give it in UTF-8") from None
    named, folder, _ = find_model(path)
    own = tokenizer_of(named, folder, tokenizer)
    encoder = encoder_of(own)
    given = [first_token(named, own), *encoder.encode([prompt])[0][:-1].tolist()]
    room = math.inf if named.longest is None else named.longest - len(given)
    if room < (tokens or 1):
        raise UserError(
            f"the prompt has {len(given) - 1} tokens, 1 stands before it and {tokens or 1} more were asked for: "
            f"{named.name} takes {named.longest} in all; shorten --prompt or lower --tokens"
        )
    model = named.models[-1][1]()
    # Otherwise the folder's settings are used wherever none is given below.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    nn.Module.to(model, device)
    if bad := next((name for name, p in model.named_parameters() if not p.isfinite().all()), None):
        raise UserError(
            f"{path}: {bad} is not finite (NaN or inf): the model diverged or is damaged; choose another"
        )
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {}
    inputs = torch.tensor([given], device=device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(  # type: ignore[operator]
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=int(min(room, _DEFAULT_TOKENS)) if tokens is None else tokens,
            eos_token_id=encoder.end_of_text,
            pad_token_id=encoder.end_of_text,
            use_cache=True,
            **sampling,
        )
    return str(own.decode(output[0, 1:], skip_special_tokens=True))
