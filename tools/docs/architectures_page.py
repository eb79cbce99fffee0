"""docs/reference/architectures.md, a row for each architecture: `python tools/docs/architectures_page.py` writes it."""

from __future__ import annotations

import itertools
import re
import sys
import textwrap
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn

from blockwise_lr.blocks import Block, BlockMap, classify, split_fused
from blockwise_lr.blocks.classify import by_rules
from blockwise_lr.blocks.model_facts import ModelFacts

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from support.architectures import CAUSAL, OTHERS, build
from support.by_function import Proof, moved_by, problems
from support.cases import CASES
from support.cases_by_hand import BY_HAND
from support.proofs import NOT_INTERCEPTED, UNBUILDABLE, excused, inputs_for, varied

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"


def main() -> None:
    transformers.logging.set_verbosity_error()
    rows, proved = [], 0
    every = [*((name, None) for name in CAUSAL if name not in UNBUILDABLE), *OTHERS]
    for model_type, task in every:
        model = varied(model_type, task)
        inputs = inputs_for(model, task)
        with torch.no_grad():
            model(**inputs)
        whole = classify(model)
        blocks = classify(split_fused(model))
        proof = moved_by(model, blocks, partial(model, **inputs))
        ours = [each for each in problems(blocks, proof) if not excused(model_type, each)]
        proved += not ours and bool(proof.attentions)
        rows.append(row(model_type, task, whole, proof))
        print(rows[-1], flush=True)
    counts = {
        "types of causal language model": len(CAUSAL),
        "of these, built with every parameter assigned": len(CAUSAL) - len(UNBUILDABLE),
        "other models, with every parameter assigned": len(OTHERS),
        f"of these {len(every)}, checked by running their attention": proved,
        "models with the block of every parameter written out by hand": len(CASES) + len(BY_HAND),
    }
    print(counts)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(counts, without_names(), rows), encoding="utf-8")


def without_names() -> str:
    """Count the parameters that keep their block when every module of every causal model has a meaningless name."""
    kept = unknown = elsewhere = 0
    for model_type in CAUSAL:
        if model_type in UNBUILDABLE:
            continue
        model = build(model_type)
        labels = classify(model)
        before = {
            id(parameter): labels[name] for name, parameter in model.named_parameters() if name in labels
        }
        rename_modules(model)
        facts = ModelFacts(model)
        for sites in facts.tree.sites.values():
            found = by_rules(sites, facts)
            unknown += isinstance(found, str)
            same = not isinstance(found, str) and found.block is before[id(sites[0].param)]
            kept += same
            elsewhere += not same and not isinstance(found, str)
    total = kept + unknown + elsewhere
    text = (
        f"Names decide little. If every module has a meaningless name, {kept} of the causal models' {total} parameters "
        f"keep their block, because structure and types decide it. {unknown} become an error, and {elsewhere} get "
        "another block."
    )
    return textwrap.fill(text, 100)


def rename_modules(model: nn.Module) -> None:
    """In place: x0, x1, ... for whatever is not an item of a list."""
    count = itertools.count()
    for module in list(model.modules()):
        if not isinstance(module, (nn.ModuleList, nn.Sequential, nn.MultiheadAttention)):
            for name in list(module._modules):
                module._modules[f"x{next(count)}"] = module._modules.pop(name)


def page(counts: Mapping[str, int], renamed: str, rows: list[str]) -> str:
    unbuilt = "\n".join(f"- `{name}`: {why}." for name, why in UNBUILDABLE.items())
    counted = "\n".join(f"| {what} | {number} |" for what, number in counts.items())
    return f"""# Architectures

The rules of `classify` are checked on these architectures of transformers {transformers.__version__}:

| | number |
| --- | --- |
{counted}

{renamed}

For each architecture a tiny model is built, with a layer of every kind that the type has. It is
classified, split and run. Its outputs stay bit-equal, and autograd shows which parameters move
queries and keys, and which move values. `python tools/docs/architectures_page.py` writes this page,
and `tests/blocks/test_architectures.py` checks every row against its model.

Not built:

{unbuilt}

| model | blocks | fused weights, and the parts in them | how the blocks of attention are known |
| --- | --- | --- | --- |
{chr(10).join(rows)}
"""


def row(model_type: str, task: str | None, whole: BlockMap, proof: Proof) -> str:
    """The line of one architecture."""
    name = f"`{model_type}`" if task is None else f"`{model_type}` ({task or 'body'})"
    found = [block.value for block in whole.counts() if block is not Block.QKV]
    return f"| {name} | {' '.join(found)} | {fused(whole)} | {known(model_type, proof)} |"


def fused(whole: BlockMap) -> str:
    """Fused weights by what their names have in common: parts in order, and how often they repeat."""
    found = {}
    for name in whole:
        entry = whole.assignment(name)
        if entry.parts and entry.slices and name.endswith("weight"):
            repeats = next(iter(entry.slices.values())).repeats
            how = f", {repeats} times in turn" if repeats > 1 else ""
            found[re.sub(r".*\.(\w+\.\w+)\.\w+$", r"\1", name)] = f"{' '.join(entry.parts)}{how}"
    return "; ".join(f"`{name}`: {parts}" for name, parts in found.items())


def known(model_type: str, proof: Proof) -> str:
    if model_type in NOT_INTERCEPTED:
        return NOT_INTERCEPTED[model_type]
    return f"by function, in {len(proof.attentions)} attentions" if proof.attentions else "no attention"


if __name__ == "__main__":
    main()
