"""A sample from a saved model."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from blockwise_lr.analysis.saved_models import encoder_of, find_model, first_token, tokenizer_of
from blockwise_lr.errors import UserError
from blockwise_lr.fp32 import fp32_precision
from blockwise_lr.train.quiet import quiet_libraries
from blockwise_lr.train.ranges import check_seed

_TOKENS = 100
_COLDEST = 1e-6


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
    """The prompt and what the model goes on with, by transformers' own ``generate``, in fp32.

    The prompt is the beginning of a document: it stands behind an end-of-text token, as in training (with other models
    behind the bos token, where they have one). Sampling stops at the document's end. Prompt, that token and sample must
    fit into the model's context together: nothing is cut off.

    Args:
        path: folder of a run (its newest whole checkpoint is taken), of a checkpoint or of a Hugging Face model.
        prompt: the text to go on with; may be empty.
        tokens: tokens to sample at most; None: 100, or as many as fit.
        temperature: divides the logits; 0: always the likeliest token.
        top_k: sample among this many likeliest tokens; 0: among all.
        seed: of the sampling; the global random state is left alone.
        tokenizer: id or folder of a Hugging Face tokenizer; None: the model's own.
        device: where to sample.

    Raises:
        UserError: no model or no tokenizer there, a prompt that is too long, a setting out of range.

    Example:
        >>> generate(Path("runs/mine"), "Fellow citizens", tokens=20, top_k=50)  # doctest: +SKIP
        'Fellow citizens of the Senate and of the House of Representatives: ...'
    """
    for name, value, least in (("tokens", tokens, 1), ("top-k", top_k, 0)):
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; expected {least} or more")
    check_seed(seed, "--seed")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"--temperature is {temperature}; expected a finite number, 0 or more")
    if 0 < temperature < _COLDEST:  # logits divided by it are infinite
        raise UserError(
            f"--temperature is {temperature}; expected 0 (the likeliest token), or {_COLDEST} or more"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no characters
        raise UserError(f"--prompt {prompt!a} is not UTF-8 text: give it in UTF-8") from None
    subject, folder, _ = find_model(path)
    own = tokenizer_of(subject, folder, tokenizer)
    encoder = encoder_of(own)
    given = [first_token(subject, own), *encoder.encode([prompt])[0][:-1].tolist()]
    room = math.inf if subject.longest is None else subject.longest - len(given)
    if room < (tokens or 1):
        raise UserError(
            f"the prompt has {len(given) - 1} tokens, 1 stands before it and {tokens or 1} more were asked for: "
            f"{subject.name} takes {subject.longest} in all; shorten --prompt or lower --tokens"
        )
    model = subject.models[-1][1]()
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
            max_new_tokens=int(min(room, _TOKENS)) if tokens is None else tokens,
            eos_token_id=encoder.end_of_text,
            pad_token_id=encoder.end_of_text,
            use_cache=True,
            **sampling,
        )
    return str(own.decode(output[0, 1:], skip_special_tokens=True))
