"""nanochat: the flags of its training script. They express the embedding's and the head's rate alone."""

from __future__ import annotations

from blockwise_lr.blocks import Block, canonical_name
from blockwise_lr.errors import UserError
from blockwise_lr.export.lines import header, needed_lr, number
from blockwise_lr.export.rates import RateGroup, Rates

_REFERENCE_WIDTH = 768


def write_nanochat(rates: Rates) -> str:
    """Return flags for ``python -m scripts.base_train``, after comments that name what they cannot express.

    nanochat's rule (92d63d4, nanochat/gpt.py, setup_optimizer): --embedding-lr and --unembedding-lr are multiplied by
    (width / 768) ** -0.5, which is divided out here. Muon trains the matrices at one --matrix-lr.
    """
    lr = needed_lr(rates, "nanochat")
    emb, head = _only(rates, Block.EMB), _only(rates, Block.HEAD)
    width = _width(rates, emb)
    factor = (width / _REFERENCE_WIDTH) ** 0.5
    embedding, unembedding = (number(group.lr_ratio * lr * factor) for group in (emb, head))
    about = [
        f"# For a width of {width}: nanochat multiplies both by ({width} / 768) ** -0.5, which is divided out",
        "# here, and by sqrt(tokens per batch / 2**19), which is not.",
    ]
    return "\n".join(
        [*header(rates, "nanochat"), *about, f"--embedding-lr {embedding} --unembedding-lr {unembedding}", ""]
    )


def _only(rates: Rates, block: Block) -> RateGroup:
    found = [group for group in rates.groups if group.block == block]
    if not found:
        raise UserError(
            f"nanochat's model has an embedding and an output head of its own, and this one has no {block.upper()}: "
            "name a model whose head is not tied to its embedding"
        )
    return found[0]


def _width(rates: Rates, emb: RateGroup) -> int:
    shapes = {canonical_name(name): parameter.shape for name, parameter in rates.model.named_parameters()}
    return int(shapes[emb.names[0]][-1])


def nanochat_losses(rates: Rates) -> tuple[str, ...]:
    """Return what nanochat's flags cannot express of these rates, a sentence each."""
    lost = []
    matrices = [group for group in rates.groups if group.block not in (Block.EMB, Block.HEAD, Block.NORM)]
    if matrices:
        wanted = ", ".join(f"{group.label.upper()} {number(group.lr_ratio)}" for group in matrices)
        lost.append(
            f"nanochat has no rates for {wanted}: Muon trains the matrices at one --matrix-lr, for which ratios of "
            "AdamW say nothing, so --matrix-lr and --scalar-lr keep nanochat's defaults"
        )
    if any(group.block == Block.NORM for group in rates.groups):
        lost.append("nanochat's norms have no parameters, so the ratio of NORM has no use")
    lost.append(
        "nanochat's value embeddings always get half of --embedding-lr, and the weight decays are its own"
    )
    return tuple(lost)
