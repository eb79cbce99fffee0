"""The trainers' own code reads what is exported for them, where they are installed.

None of them is a dependency. The Makefile installs torchtitan, AutoModel, Megatron-core, axolotl, fairseq2 and
OLMo-core without theirs. Names with Transformer Engine's layers, and those of its grouped experts, need a GPU: they are
written out by hand from Megatron's code, in support/codebase_names.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from blockwise_lr import classify
from blockwise_lr.export import export_rates
from blockwise_lr.export.codebase_names import _TABLES
from support.codebase_names import NAMES
from support.export_models import MODELS, RATIOS, expected_ratios, tiny
from support.matching_rules import RULES
from support.matching_rules import axolotl as axolotls_rule
from support.stand_ins import prepare_fairseq2, prepare_olmo_core
from support.vision import import_timm

LR = 1e-3
pytestmark = (
    pytest.mark.slow
)  # imports of up to 15 seconds; test_targets.py applies the same rules without them


def rates_in(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return the learning rate and weight decay of each parameter of a model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def expected(model: nn.Module) -> dict[str, object]:
    return {n: (pytest.approx(LR * r), pytest.approx(0.1)) for n, r in expected_ratios(model).items()}


def loaded(text: str) -> dict[str, object]:
    namespace: dict[str, object] = {}
    exec(compile(text, "exported", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("name", MODELS)
def test_torchtitan_builds_its_optimizer(name):
    pytest.importorskip("spmd_types")
    pytest.importorskip("torchtitan.components.optimizer")
    model = tiny(name, "cpu")
    config = loaded(export_rates(model, "torchtitan", lr=LR, ratios=RATIOS, names="model").text)["optimizer"]
    config.implementation = "for-loop"
    (optimizer,) = config.build(model_parts=[model]).optimizers
    assert rates_in(optimizer, model) == expected(model)


@pytest.mark.parametrize("name", MODELS)
def test_automodel_builds_its_optimizer_and_scheduler(name):
    optimizers = pytest.importorskip("nemo_automodel.components.optim.optimizer")
    schedulers = pytest.importorskip("nemo_automodel.components.optim.scheduler")
    model = tiny(name, "cpu")
    settings = yaml.safe_load(export_rates(model, "automodel", lr=LR, ratios=RATIOS).text)["optimizer"]
    settings.pop("_target_")
    (optimizer,) = optimizers.AdamWConfig(**settings).build(model)
    schedulers.OptimizerParamScheduler(
        optimizer, init_lr=LR, max_lr=LR, min_lr=LR, lr_warmup_steps=0, lr_decay_steps=10,
        lr_decay_style="constant", start_wd=0.1, end_wd=0.1, wd_incr_steps=10, wd_incr_style="constant",
    )  # fmt: skip
    assert rates_in(optimizer, model) == expected(model)


@pytest.mark.parametrize("name", MODELS)
def test_megatrons_keys_match_and_its_overrides_merge(name):
    config = pytest.importorskip("megatron.core.optimizer.optimizer_config")
    scheduler = pytest.importorskip("megatron.core.optimizer_param_scheduler")
    model = tiny(name)
    overrides = loaded(export_rates(model, "megatron", lr=LR, ratios=RATIOS, names="model").text)[
        "block_overrides"
    ]
    assert all(isinstance(key, config.ParamKey) for key in overrides)
    found = {}
    for each, parameter in model.named_parameters():
        matching = [override for key, override in overrides.items() if key.matches(parameter, each)]
        found[each] = scheduler.combine_param_group_overrides(matching)["max_lr"]
    assert found == {each: pytest.approx(LR * ratio) for each, ratio in expected_ratios(model).items()}


@pytest.mark.parametrize("name", MODELS)
def test_olmo_core_builds_its_optimizer(name, monkeypatch):
    prepare_olmo_core(monkeypatch)
    model = tiny(name, "cpu")
    optim = loaded(export_rates(model, "olmo-core", lr=LR, ratios=RATIOS, names="model").text)["optim"]
    assert rates_in(optim.build(model), model) == expected(model)


@pytest.mark.parametrize("name", MODELS)
def test_fairseq2_makes_its_groups(name, monkeypatch):
    prepare_fairseq2(monkeypatch)
    from fairseq2.recipe.config import AdamWConfig, AdamWGroupConfig
    from fairseq2.recipe.optim import prepare_parameter_groups
    from fairseq2.utils.structured import StandardValueConverter

    model = tiny(name, "cpu")
    content = yaml.safe_load(export_rates(model, "fairseq2", lr=LR, ratios=RATIOS, names="model").text)
    assert content["optimizer"]["name"] == "adamw"
    config = StandardValueConverter().structure(content["optimizer"]["config"], AdamWConfig)
    assert all(isinstance(group, AdamWGroupConfig) for group in config.groups)
    groups = prepare_parameter_groups(model, config.groups)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    assert rates_in(optimizer, model) == expected(model)


@pytest.mark.parametrize("name", MODELS)
def test_axolotls_schema_takes_the_groups(name):
    schemas = pytest.importorskip("axolotl.utils.schemas.training")
    content = yaml.safe_load(export_rates(tiny(name), "axolotl", lr=LR, ratios=RATIOS).text)
    fields = schemas.HyperparametersConfig.model_fields
    assert content.keys() <= fields.keys()
    config = schemas.HyperparametersConfig(**content, gradient_accumulation_steps=1, micro_batch_size=1)
    assert [group.model_dump() for group in config.lr_groups] == content["lr_groups"]


@pytest.fixture(scope="module")
def mixin() -> type:
    """The class of axolotl that makes the groups; its file is loaded alone, without the packages of the trainer."""
    found = importlib.util.find_spec("axolotl")
    if found is None:
        pytest.skip("axolotl is not installed")
    path = Path(found.submodule_search_locations[0]) / "core/trainers/mixins/optimizer.py"
    spec = importlib.util.spec_from_file_location("axolotl_mixin", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.OptimizerMixin


class WithSavedModule(nn.Module):
    """A weight that PEFT trains whole, next to an adapter: axolotl counts it as an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.score = nn.Module()
        self.score.modules_to_save = nn.ModuleDict({"default": nn.Linear(4, 2)})


@pytest.mark.parametrize("name", [*MODELS, "modules_to_save"])
def test_axolotl_makes_the_groups_that_the_written_out_rule_gives(name, mixin):
    model = WithSavedModule() if name == "modules_to_save" else tiny(name, "cpu")
    blocks = {"q_proj": "qk", "score": "head"} if name == "modules_to_save" else None
    settings = {"blocks": classify(model, overrides=blocks)} if blocks else {}
    text = export_rates(model, "axolotl", lr=LR, ratios=RATIOS, **settings).text
    content = yaml.safe_load(text)
    args = types.SimpleNamespace(
        **{"embedding_lr_scale": None, "embedding_lr": None, "lr_groups": None, **content}
    )
    trainer = types.SimpleNamespace(
        args=args, get_decay_parameter_names=lambda each: mixin.get_decay_parameter_names(None, each)
    )
    groups = mixin.create_optimizer_grouped_parameters(trainer, model, {"lr": content["learning_rate"]})
    assert rates_in(torch.optim.AdamW(groups), model) == axolotls_rule(text, model)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224"])
def test_timm_makes_its_optimizer_and_its_schedule_keeps_the_ratios(name):
    timm = import_timm()
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    model = timm.create_model(
        name, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=4
    )
    block_groups = loaded(export_rates(model, "timm", ratios=RATIOS).text)["block_groups"]
    optimizer = create_optimizer_v2(model, "adamw", lr=LR, param_group_fn=block_groups)
    schedule = CosineLRScheduler(optimizer, t_initial=10, t_in_epochs=False)
    for step in (0, 5):
        schedule.step_update(step)
        base = LR if step == 0 else LR / 2
        found = {each: lr / base for each, (lr, _) in rates_in(optimizer, model).items()}
        assert found == pytest.approx(expected_ratios(model))


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_optax_moves_every_leaf_at_the_rate_of_its_block(name, scheduled):
    pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    import jax
    import numpy as np

    model = tiny(name)
    made = loaded(export_rates(model, "optax", ratios=RATIOS, weight_decay=0).text)
    params: dict[str, object] = {}
    for each in expected_ratios(model):
        *path, leaf = each.split(".")
        inner = params
        for word in path:
            inner = inner.setdefault(word, {})
        inner["kernel" if leaf == "weight" else leaf] = np.zeros(1, np.float32)
    lr = optax.constant_schedule(LR) if scheduled else LR
    optimizer = made["adamw_by_block"](lr)
    gradients = jax.tree_util.tree_map(np.ones_like, {"params": params})
    updates, _ = optimizer.update(gradients, optimizer.init({"params": params}), {"params": params})
    leaves, _ = jax.tree_util.tree_flatten_with_path(updates["params"])
    found = {
        jax.tree_util.keystr(p, simple=True, separator=".").replace("kernel", "weight"): leaf
        for p, leaf in leaves
    }
    # Adam's first step has the size of the learning rate.
    assert {each: float(-leaf[0]) for each, leaf in found.items()} == {
        each: pytest.approx(LR * ratio, rel=1e-4) for each, ratio in expected_ratios(model).items()
    }
    with pytest.raises(ValueError, match=r"mystery\.kernel matches 0 blocks; expected 1"):
        made["labels"]({"mystery": {"kernel": np.zeros(1)}})


def test_torchtitans_names_are_those_of_its_own_adapter():
    pytest.importorskip("triton")
    adapters = pytest.importorskip("torchtitan.models.llama3.state_dict_adapter")
    adapter = adapters.Llama3StateDictAdapter.__new__(adapters.Llama3StateDictAdapter)
    adapter.__init__(types.SimpleNamespace(), None)
    table = _TABLES["torchtitan"][0]
    for theirs, ours in adapter.from_hf_map.items():
        if ours is not None:
            assert f"{table[theirs.removesuffix('.weight')]}.weight" == ours


def test_olmo_cores_names_are_those_of_its_own_conversion(monkeypatch):
    prepare_olmo_core(monkeypatch)
    convert = pytest.importorskip("olmo_core.nn.hf.convert")
    layer = str(convert.LAYER)
    theirs = convert.HF_TO_OLMO_CORE_WEIGHT_MAPPINGS
    theirs |= convert.MODEL_TYPE_SPECIFIC_HF_TO_OLMO_CORE_WEIGHT_MAPPINGS["llama"]
    for ours, named in _TABLES["olmo-core"][0].items():
        assert theirs[f"{ours.replace('{}', layer)}.weight"] == f"{named.replace('{}', layer)}.weight"


def test_fairseq2s_names_are_those_of_its_own_conversion(monkeypatch):
    prepare_fairseq2(monkeypatch)
    from fairseq2.models.llama import interop as llama
    from fairseq2.models.qwen import interop as qwen

    for theirs, ours in _TABLES["fairseq2"][0].items():
        name = f"{theirs.format(3)}.weight"
        maps = (
            [qwen._HG_KEY_MAP]
            if "q_norm" in name or "k_norm" in name
            else [llama._HG_KEY_MAP, qwen._HG_KEY_MAP]
        )
        for key_map in maps:
            converted = {
                re.sub(pattern, new, name) for pattern, new in key_map.items() if re.search(pattern, name)
            }
            assert converted == {f"{ours.format(3)}.weight"}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Iterator[None]:
    """The process groups of Megatron, for one process on the CPU."""
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    meeting = tmp_path_factory.mktemp("megatron") / "meeting"
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{meeting}")
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def gpt_model(name: str) -> nn.Module:
    """Return Megatron's model of an architecture, two layers on the meta device, with its local layers."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config: dict[str, object] = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    model, spec = {"share_embeddings_and_output_weights": True}, {}
    if name != "gpt2":
        config |= {"normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False}
        config |= {"activation_func": nn.functional.silu, "ffn_hidden_size": 32}
        model, spec = {"position_embedding_type": "rope"}, {"normalization": "RMSNorm"}
    if name == "mixtral":
        config["num_moe_experts"] = spec["num_experts"] = 2
    made = TransformerConfig(**config, bf16=True, use_cpu_initialization=True, perform_initialization=False)
    with torch.device("meta"):
        return GPTModel(made, get_gpt_layer_local_spec(**spec), 40, max_sequence_length=12, **model)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
@pytest.mark.filterwarnings("ignore::UserWarning:megatron.*")
def test_megatrons_names_are_those_of_its_own_model_which_gets_the_rates_of_the_blocks(name, one_process):
    model = gpt_model(name)
    names = [each for each, _ in model.named_parameters()]
    blocks = {each: NAMES["megatron", name][each.replace("layers.0.", "layers.1.")] for each in names}
    text = export_rates(tiny(name), "megatron", lr=LR, ratios={**RATIOS, "qkv": 0.25}).text
    assert {each: lr for each, (lr, _) in RULES["megatron"](text, names).items()} == {
        each: pytest.approx(LR * {**RATIOS, "qkv": 0.25}[block]) for each, block in blocks.items()
    }
    optimizers = pytest.importorskip("megatron.core.optimizer")
    # As its training script passes it on with --bf16, but for DistributedDataParallel, which needs a GPU.
    wrapped = importlib.import_module("megatron.core.transformer.module").Float16Module(model.config, model)
    groups = optimizers._get_param_groups(
        [wrapped],
        optimizers.OptimizerConfig(lr=LR, min_lr=0.0, weight_decay=0.1),
        loaded(text)["block_overrides"],
    )
    of = {id(parameter): each for each, parameter in model.named_parameters()}
    found = {of[id(parameter)]: group["max_lr"] for group in groups for parameter in group["params"]}
    assert found == {
        each: pytest.approx(LR * {**RATIOS, "qkv": 0.25}[block]) for each, block in blocks.items()
    }
