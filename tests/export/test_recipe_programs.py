"""The programs and configurations of examples/recipes/export, read by the trainers' own code where it is installed."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from blockwise_lr import param_groups
from blockwise_lr.export import export_rates
from support.codebase_names import NAMES
from support.export_models import RATIOS, tiny
from support.matching_rules import RULES
from support.stand_ins import prepare_fairseq2, prepare_olmo_core

LR = 1e-3
ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "examples" / "recipes" / "export"
slow = pytest.mark.slow  # imports of seconds


def written(target: str, names: str = "auto") -> str:
    return export_rates(tiny("llama"), target, lr=LR, ratios=RATIOS, names=names).text


def configuration(target: str) -> dict[str, object]:
    """Return what `cat TARGET.yaml blocks.yaml` makes; no key may be there twice."""
    parts = [yaml.safe_load(text) for text in ((PROGRAMS / f"{target}.yaml").read_text(), written(target))]
    assert not parts[0].keys() & parts[1].keys()
    return parts[0] | parts[1]


@pytest.fixture
def blocks(monkeypatch, tmp_path):
    """A function that writes blocks.py for a trainer into a folder from which it is imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "blocks", raising=False)
    yield lambda target: (tmp_path / "blocks.py").write_text(written(target))
    sys.modules.pop("blocks", None)


@pytest.mark.parametrize("target", ["automodel", "axolotl", "fairseq2"])
def test_the_two_files_make_one_configuration(target):
    assert configuration(target)


@slow
def test_automodel_knows_all_that_its_recipe_names():
    package = pytest.importorskip("nemo_automodel")
    loader = pytest.importorskip("nemo_automodel.components.config.loader")
    optimizers = pytest.importorskip("nemo_automodel.components.optim.optimizer")
    steps = pytest.importorskip("nemo_automodel.components.training.step_scheduler")
    recipe = configuration("automodel")
    targets = re.findall(r"(?:_target_|collate_fn): (\S+)", (PROGRAMS / "automodel.yaml").read_text())
    (model,) = [each for each in targets if each.startswith("nemo_automodel.NeMoAutoModel")]
    for each in set(targets) - {model}:
        assert callable(loader._resolve_target(each)), each
    assert model.split(".")[1] in package._LAZY_ATTRS  # itself it needs torchao
    known = steps.StepSchedulerConfig.__dataclass_fields__.keys() | {"local_batch_size"}  # the data loader's
    assert recipe["step_scheduler"].keys() <= known
    assert recipe["lr_scheduler"].keys() <= optimizers.LRSchedulerConfig.__dataclass_fields__.keys()
    # As SmolLM2, with its head tied to its embedding: the pattern for the head matches nothing.
    tied = LlamaForCausalLM(LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    ))  # fmt: skip
    recipe["optimizer"].pop("_target_")
    (optimizer,) = optimizers.AdamWConfig(**recipe["optimizer"]).build(tied)
    of = {id(parameter): name for name, parameter in tied.named_parameters()}
    mults = {of[id(p)]: group.get("lr_mult", 1) for group in optimizer.param_groups for p in group["params"]}
    assert mults["model.embed_tokens.weight"] == 16
    assert mults["model.layers.1.self_attn.q_proj.weight"] == 4
    assert mults.keys() == dict(tied.named_parameters()).keys()


@slow
def test_axolotls_whole_schema_takes_the_configuration():
    schemas = pytest.importorskip("axolotl.utils.schemas.config")
    content = configuration("axolotl")
    assert content.keys() <= schemas.AxolotlInputConfig.model_fields.keys()
    config = schemas.AxolotlInputConfig(**content)
    assert [group.model_dump() for group in config.lr_groups] == content["lr_groups"]


@slow
def test_fairseq2_takes_every_section_of_the_configuration(monkeypatch):
    prepare_fairseq2(monkeypatch)
    from fairseq2.models.llama import LLaMAConfig
    from fairseq2.models.llama.tokenizer import LLaMATokenizerConfig
    from fairseq2.recipe import config as sections
    from fairseq2.utils.structured import StandardValueConverter

    content, converter = configuration("fairseq2"), StandardValueConverter()
    dataset = content.pop("dataset")
    assert dataset.keys() - {"max_seq_len", "max_num_tokens"} <= {"name", "family", "config_overrides"}
    inner = {"lr_scheduler": sections.CosineAnnealingLRConfig, "optimizer": sections.AdamWConfig}
    for name, section in content.items():
        kind = {"lr_scheduler": "LRScheduler"}.get(name, name.capitalize())
        converter.structure(section, getattr(sections, f"{kind}Section"))
        if name in inner:
            converter.structure(section["config"], inner[name])
    assert content["model"]["config_overrides"].keys() <= LLaMAConfig.__dataclass_fields__.keys()
    assert content["tokenizer"]["config_overrides"].keys() <= LLaMATokenizerConfig.__dataclass_fields__.keys()


@slow
def test_olmo_cores_program_builds_its_model_and_its_optimizer(monkeypatch, blocks):
    prepare_olmo_core(monkeypatch)
    blocks("olmo-core")
    program = runpy.run_path(str(PROGRAMS / "olmo_core_train.py"))
    model = program["model"].build(init_device="meta")
    optimizer = program["train_module"].optim.build(model)
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {of[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    hand = NAMES["olmo-core", "llama"]
    assert found == {
        name: pytest.approx(LR * RATIOS[hand[re.sub(r"blocks\.\d+", "blocks.1", name)]])
        for name in of.values()
    }
    assert RULES["olmo-core"](written("olmo-core"), of.values()).keys() == found.keys()


def test_megatrons_program_passes_the_overrides_on(monkeypatch, tmp_path, blocks):
    """megatron.training is not on PyPI: a module with its one function stands in for it."""
    pytest.importorskip("megatron.core.optimizer.optimizer_config")
    blocks("megatron")
    training = types.ModuleType("megatron.training.training")
    training.get_megatron_optimizer_config = lambda args: (args.lr, {"Megatron's": "own"})
    package = types.ModuleType("megatron.training")
    package.training = training
    monkeypatch.setitem(sys.modules, "megatron.training", package)
    monkeypatch.setitem(sys.modules, "megatron.training.training", training)
    monkeypatch.chdir(tmp_path)
    Path("pretrain_gpt.py").write_text("assert __name__ == '__main__'")
    program = runpy.run_path(str(PROGRAMS / "megatron_pretrain.py"))
    found = training.get_megatron_optimizer_config(argparse.Namespace(lr=LR))
    assert found == (LR, program["block_overrides"])


@slow
def test_optaxs_page_makes_an_optimizer_and_labels(monkeypatch, blocks):
    jax = pytest.importorskip("jax")
    pytest.importorskip("optax")
    blocks("optax")
    page = (ROOT / "docs/recipes/optax.md").read_text(encoding="utf-8")
    code = textwrap.dedent(re.search(r"^ *```python\n(.*?)^ *```", page, re.DOTALL | re.MULTILINE)[1])
    leaf = jax.numpy.ones(2)
    attention = {"q_proj": {"kernel": leaf}}
    params = {
        "params": {"model": {"embed_tokens": {"embedding": leaf}, "layers": {"0": {"self_attn": attention}}}}
    }
    made = {"params": params}
    exec(compile(code, "page", "exec"), made)
    assert jax.tree_util.tree_leaves(made["state"])
    blocks_of_leaves = sys.modules["blocks"].labels(params)["params"]["model"]
    assert blocks_of_leaves["embed_tokens"] == {"embedding": "emb"}
    assert blocks_of_leaves["layers"]["0"]["self_attn"] == {"q_proj": {"kernel": "qk"}}


@pytest.mark.parametrize(("exported", "given"), [(LR, None), (None, LR), (5 * LR, LR)])
def test_deepspeeds_program_makes_a_model_that_the_command_exports(tmp_path, exported, given):
    program = runpy.run_path(str(PROGRAMS / "deepspeed_train.py"))
    model = program["build"]()
    path = tmp_path / "blocks.json"
    path.write_text(export_rates(model, "json", lr=exported).text)
    groups = program["groups_from_json"](model, path, *([] if given is None else [given]))
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {group["block"]: group["lr"] for group in groups} == pytest.approx(
        {group["block"]: group["lr"] for group in param_groups(model, LR)}
    )
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    torch.optim.AdamW(groups).step()


def test_deepspeeds_program_asks_for_a_learning_rate_that_the_file_does_not_have(tmp_path):
    program = runpy.run_path(str(PROGRAMS / "deepspeed_train.py"))
    model = program["build"]()
    path = tmp_path / "blocks.json"
    path.write_text(export_rates(model, "json").text)
    with pytest.raises(
        ValueError, match=r"blocks\.json has no learning rate: give groups_from_json one, such as lr"
    ):
        program["groups_from_json"](model, path)
