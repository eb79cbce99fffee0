"""What is written into a split weight reaches its parts: by PEFT, initialisation, averages of weights, and by hand."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from blockwise_lr.blocks import merge_fused, split_fused
from support.case import VOCAB, WIDTH, Case
from support.cases import FUSED_CASES, gpt2
from support.nano import NanoAttention, NanoGPT

# Conv1D and biases, torch's own parameters, grouped queries, stacked keys and values, group by group.
NAMES = (
    "gpt2-cross-attention",
    "torch-decoder",
    "torch-attention-of-three-widths",
    "nanogpt-gqa-without-biases",
    "litgpt-group-by-group",
)
WRITTEN = [case for case in FUSED_CASES if case.name in NAMES]
by_name = pytest.mark.parametrize("case", WRITTEN, ids=lambda case: case.name)


def split_and_whole(case: Case) -> tuple[nn.Module, nn.Module]:
    return split_fused(case.model()), case.model()


def fused(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def assert_same(split: nn.Module, whole: nn.Module) -> None:
    """Equal checkpoints, from the parts alone."""
    state = merge_fused(copy.deepcopy(split)).state_dict()
    for key, value in whole.state_dict().items():
        assert torch.equal(state[key], value), key


def _set_data(module: nn.Module, leaf: str) -> None:
    getattr(module, leaf).data = torch.full_like(getattr(module, leaf), 3.0)


def _iadd_data(module: nn.Module, leaf: str) -> None:
    getattr(module, leaf).data += 2


def _add_data(module: nn.Module, leaf: str) -> None:
    getattr(module, leaf).data.add_(1).mul_(3)


def _copy(module: nn.Module, leaf: str) -> None:
    with torch.no_grad():
        getattr(module, leaf).copy_(
            torch.arange(getattr(module, leaf).numel()).view_as(getattr(module, leaf))
        )


def _iadd(module: nn.Module, leaf: str) -> None:
    with torch.no_grad():
        module_weight = getattr(module, leaf)
        module_weight += 1


def _assign_after_iadd(module: nn.Module, leaf: str) -> None:
    with torch.no_grad():
        setattr(module, leaf, getattr(module, leaf).__iadd__(1))


def _item(module: nn.Module, leaf: str) -> None:
    with torch.no_grad():
        getattr(module, leaf)[1:5] = 7
        getattr(module, leaf).data[0] = 5


def _views(module: nn.Module, leaf: str) -> None:
    with torch.no_grad():
        weight = getattr(module, leaf)
        weight.view(-1)[::2].fill_(2)
        weight.t().mul_(2)
        weight.chunk(3)[1].zero_()
        weight.detach()[-1].add_(1)


def _out(module: nn.Module, leaf: str) -> None:
    with torch.no_grad():
        weight = getattr(module, leaf)
        torch.add(weight, 1, out=weight)


def _foreach(module: nn.Module, leaf: str) -> None:
    with torch.no_grad():
        torch._foreach_mul_([getattr(module, leaf), torch.ones(2)], 2.0)


def _normal(module: nn.Module, leaf: str) -> None:
    nn.init.normal_(getattr(module, leaf), std=0.3)


def _normal_data(module: nn.Module, leaf: str) -> None:
    getattr(module, leaf).data.normal_()


def _orthogonal(module: nn.Module, leaf: str) -> None:
    init = nn.init.orthogonal_ if getattr(module, leaf).ndim > 1 else nn.init.ones_
    init(getattr(module, leaf))


def _eye(module: nn.Module, leaf: str) -> None:
    init = nn.init.eye_ if getattr(module, leaf).ndim > 1 else nn.init.ones_
    init(getattr(module, leaf))


def _parameter(module: nn.Module, leaf: str) -> None:
    setattr(module, leaf, nn.Parameter(torch.full_like(getattr(module, leaf), 0.5)))


def _held(module: nn.Module, leaf: str) -> None:
    weight = getattr(module, leaf)
    with torch.no_grad():
        weight.add_(1)
        for parameter in module.parameters(recurse=True):  # as an optimizer does
            parameter.mul_(2)
        weight.add_(1)


def _decayed_in_place(module: nn.Module, leaf: str) -> None:
    with torch.inference_mode():
        getattr(module, leaf).mul_(0.5)


def _set_storage(module: nn.Module, leaf: str) -> None:
    with torch.no_grad():
        getattr(module, leaf).set_(torch.full_like(getattr(module, leaf), 4.0))


WRITES: tuple[Callable[[nn.Module, str], None], ...] = (
    _set_data, _iadd_data, _add_data, _copy, _iadd, _assign_after_iadd, _item, _views, _out, _foreach, _normal,
    _normal_data, _orthogonal, _eye, _parameter, _held, _decayed_in_place, _set_storage,
)  # fmt: skip


@by_name
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_write_into_a_split_weight_is_a_write_into_its_parts(
    case: Case, write: Callable[[nn.Module, str], None]
) -> None:
    models = split_and_whole(case)
    for model in models:
        torch.manual_seed(3)
        for name in case.split:
            module, leaf = fused(model, name)
            if write is not _views or getattr(module, leaf).ndim > 1:
                write(module, leaf)
    assert_same(*models)
    split, whole = models
    assert torch.equal(case.output(split), case.output(whole))
    assert {name: p.requires_grad for name, p in split.named_parameters()} == dict.fromkeys(
        (name for name, _ in split.named_parameters()), True
    )


# Initialisation ---------------------------------------------------------------------------------------


def _reset(module: nn.Module) -> None:
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(getattr(module, name, None)):
            getattr(module, name)()


@by_name
def test_weights_initialised_after_the_split_are_those_of_the_fused_model(case: Case) -> None:
    models = split_and_whole(case)
    for model in models:
        torch.manual_seed(5)
        model.apply(_reset)
    assert_same(*models)


def test_meta_device_then_split_then_to_empty_then_init() -> None:
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif "weight" in module._parameters:
            nn.init.ones_(module.weight)

    models = []
    for prepare in (split_fused, lambda model: model):
        with torch.device("meta"):
            model = NanoGPT(layers=2, tied=False)
        prepare(model)
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        torch.manual_seed(0)
        model.apply(init)
        models.append(model)
    assert_same(*models)
    assert torch.equal(models[0](torch.arange(5)[None]), models[1](torch.arange(5)[None]))


def test_transformers_initialises_a_split_model_anew() -> None:
    pytest.importorskip("transformers")
    models = [split_fused(gpt2(n_layer=2)), gpt2(n_layer=2)]
    for model in models:
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        for module in model.modules():
            module._is_hf_initialized = False
        torch.manual_seed(0)
        model.init_weights()
    assert_same(*models)
    assert not any(value.isnan().any() for value in models[0].state_dict().values())


# Averages of weights -------------------------------------------------------------------------------


def _by_state_dict(average: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        state = model.state_dict()
        for key, value in average.state_dict().items():
            value.mul_(0.9).add_(state[key], alpha=0.1)


def _by_copy(average: nn.Module, model: nn.Module) -> None:
    for old, new in zip(average.state_dict().values(), model.state_dict().values()):
        old.copy_(0.9 * old + 0.1 * new)


def _by_foreach(average: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(average.state_dict().values()), list(model.state_dict().values()), 0.1)


def _by_parameters(average: nn.Module, model: nn.Module) -> None:
    for old, new in zip(average.parameters(), model.parameters()):
        old.data = old.data * 0.9 + new.data * 0.1


@pytest.mark.parametrize("update", [_by_state_dict, _by_copy, _by_foreach, _by_parameters])
@pytest.mark.parametrize("build", [gpt2, lambda: NanoGPT(tied=False)])
def test_an_average_of_weights_moves_the_split_weights_too(update, build) -> None:
    averages = []
    for prepare in (split_fused, lambda model: model):
        torch.manual_seed(0)
        model = prepare(build())
        average = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            out = model(torch.arange(6)[None])
            (out if isinstance(out, Tensor) else out.logits).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            update(average, model)
        averages.append(average)
    for old, new in zip(averages[1].parameters(), build().parameters()):
        assert old.shape == new.shape
    split, whole = merge_fused(averages[0]).state_dict(), averages[1].state_dict()
    assert all(torch.allclose(split[key], whole[key], rtol=1e-5, atol=1e-7) for key in whole)


def test_state_dict_tensors_that_are_kept_follow_training() -> None:
    model = split_fused(NanoAttention())
    state = model.state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
        state["c_attn.weight"][0] = 9
    expected = torch.cat(list(model.c_attn.parametrizations.weight.parameters()))
    assert torch.equal(state["c_attn.weight"], expected)
    assert (expected[0] == 9).all()
    assert torch.equal(model.c_proj.weight, state["c_proj.weight"])


def test_torchs_averaged_model_averages_a_split_model() -> None:
    model = split_fused(gpt2())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    before = model.state_dict()["transformer.h.0.attn.c_attn.weight"].clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(2)
    average.update_parameters(model)
    moved = average.module.state_dict()["transformer.h.0.attn.c_attn.weight"]
    assert torch.allclose(moved, before + 1)


# Adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"safe_merge": True}])
@pytest.mark.parametrize("build", [gpt2, lambda: NanoGPT(tied=False)])
def test_peft_merges_an_adapter_into_a_split_weight(build, variant) -> None:
    peft = pytest.importorskip("peft")
    variant = dict(variant)
    safe = variant.pop("safe_merge", False)
    torch.manual_seed(0)
    model = split_fused(build()).eval()
    targets = ["c_attn", "c_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **variant)
    adapted = peft.get_peft_model(model, config).eval()

    def logits(model: nn.Module) -> Tensor:
        out = model(torch.arange(8)[None])
        return out if isinstance(out, Tensor) else out.logits

    before = logits(model).detach()
    with adapted.disable_adapter():
        plain = logits(model).detach()
    assert not torch.allclose(plain, before, atol=1e-2)
    adapted.merge_adapter(safe_merge=safe)
    assert torch.allclose(logits(model), before, atol=1e-5)
    adapted.unmerge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-5)
    with adapted.disable_adapter():
        assert torch.allclose(logits(model), plain, atol=1e-5)
    merged = adapted.merge_and_unload(safe_merge=safe)
    assert torch.allclose(logits(merged), before, atol=1e-5)
    assert torch.allclose(logits(merge_fused(merged)), before, atol=1e-5)


# What stays as it was -----------------------------------------------------------------------------------


def test_in_a_forward_pass_the_weight_is_a_plain_tensor() -> None:
    seen = []

    class Reads(NanoAttention):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(type(self.c_attn.weight))
            return super().forward(x)

    model = split_fused(Reads())
    seen.clear()  # of the proof of its layout
    model(torch.randn(1, 3, WIDTH))
    assert seen == [Tensor]


def test_a_forward_hook_may_write() -> None:
    model = split_fused(NanoAttention())

    def clamp(module: nn.Module, inputs: object) -> None:
        module.weight.data.clamp_(-0.01, 0.01)

    model.c_attn.register_forward_pre_hook(clamp)
    out = model(torch.randn(1, 3, WIDTH))
    assert out.isfinite().all()
    assert all(part.abs().max() <= 0.01 for part in model.c_attn.parametrizations.weight.parameters())


def test_gradients_flow_from_a_weight_that_is_read_outside_of_a_forward_pass() -> None:
    model = split_fused(NanoAttention())
    model.c_attn.weight.square().sum().backward()
    for part in model.c_attn.parametrizations.weight.parameters():
        assert torch.equal(part.grad, 2 * part)


def test_freezing_the_split_weight_freezes_its_parts() -> None:
    model = split_fused(NanoAttention())
    model.c_attn.weight.requires_grad_(False)
    model.c_attn.bias.requires_grad = False
    assert not any(p.requires_grad for p in model.c_attn.parameters())
    model.c_attn.weight.requires_grad_(True)
    assert all(p.requires_grad for p in model.c_attn.parametrizations.weight.parameters())


def test_what_leaves_the_model_is_a_plain_tensor() -> None:
    model = split_fused(NanoAttention())
    weight, state = model.c_attn.weight, model.state_dict()
    for tensor in (weight, state["c_attn.weight"]):
        assert type(tensor + 1) is Tensor
        assert type(tensor.clone()) is Tensor
        assert type(copy.deepcopy(tensor)) is Tensor
        assert type(pickle.loads(pickle.dumps(tensor))) is Tensor
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert list(loaded) == list(state)
    assert all(type(value) is Tensor and torch.equal(value, state[key]) for key, value in loaded.items())


def test_a_tensor_that_outlives_the_split_writes_into_the_merged_weight() -> None:
    model = split_fused(NanoAttention())
    weight = model.c_attn.weight
    merge_fused(model)
    weight.data.fill_(2)
    assert (model.c_attn.weight == 2).all()


def test_merging_a_deep_copy_leaves_the_original_split() -> None:
    model = split_fused(NanoAttention())
    x = torch.randn(1, 3, WIDTH)
    expected = model(x)
    assert torch.equal(merge_fused(copy.deepcopy(model))(x), expected)
    assert torch.equal(model(x), expected)
    assert torch.equal(merge_fused(model)(x), expected)


# What is refused -----------------------------------------------------------------------------------------


def test_a_write_that_autograd_records_is_refused_as_for_any_parameter() -> None:
    model = split_fused(NanoAttention())
    before = model.c_attn.weight.clone()
    with pytest.raises(RuntimeError, match=r"Linear\.weight requires gradients.*torch\.no_grad\(\)"):
        model.c_attn.weight.add_(1)
    assert torch.equal(model.c_attn.weight, before)


def test_a_numpy_array_of_a_split_weight_cannot_be_written() -> None:
    model = split_fused(NanoAttention())
    array = model.c_attn.weight.detach().numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_a_write_through_dlpack_is_warned_of() -> None:
    model = split_fused(NanoAttention())
    with pytest.warns(UserWarning, match=r"through DLPack into Linear\.weight is lost.*merge_fused"):
        torch.from_dlpack(model.c_attn.weight.detach())


def test_a_gradient_hook_that_would_never_run_is_refused() -> None:
    model = split_fused(NanoAttention())
    with pytest.raises(
        RuntimeError, match=r"a gradient hook on Linear\.weight would never run.*parametrizations"
    ):
        model.c_attn.weight.register_hook(lambda gradient: gradient)


def test_a_weight_of_another_shape_is_refused() -> None:
    model = split_fused(NanoAttention())
    with pytest.raises(ValueError, match=r"Linear\.weight has shape \(24, 8\) and is split.*merge_fused"):
        model.c_attn.weight.data = torch.zeros(8, 8)
    with pytest.raises(ValueError, match=r"Linear\.weight has shape \(24, 8\) and is split.*merge_fused"):
        model.c_attn.weight = nn.Parameter(torch.zeros(8, 8))


def test_a_weight_of_another_type_changes_the_type_of_the_parts() -> None:
    model = split_fused(NanoAttention())
    model.c_attn.weight.data = model.c_attn.weight.data.bfloat16()
    assert {p.dtype for p in model.c_attn.parametrizations.weight.parameters()} == {torch.bfloat16}


def test_compiling_a_split_model_breaks_no_graph() -> None:
    model = split_fused(NanoGPT())
    tokens = torch.randint(VOCAB, (2, 6))
    expected = model(tokens)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(tokens), expected, atol=1e-6)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.zero_()
    assert torch.allclose(compiled(tokens), model(tokens), atol=1e-6)


def test_averaging_into_a_state_dict_may_be_compiled() -> None:
    model, average = split_fused(NanoAttention()), split_fused(NanoAttention())
    expected = (average.c_attn.weight + model.c_attn.weight) / 2
    update = torch.compile(lambda old, new: old.lerp_(new, 0.5), backend="eager")
    with torch.no_grad():
        for old, new in zip(average.state_dict().values(), model.state_dict().values()):
            update(old, new)
    assert torch.allclose(average.c_attn.weight, expected)


def test_a_parameter_made_of_a_split_weight_is_one_like_any_other() -> None:
    model, other = split_fused(NanoAttention()), NanoAttention()
    state = model.state_dict()
    other.load_state_dict(state, assign=True)
    assert type(other.c_attn.weight) is nn.Parameter
    assert type(nn.Parameter(model.c_attn.weight)) is nn.Parameter
    before = other.c_attn.weight.detach().clone()
    with torch.no_grad():
        other.c_attn.bias.zero_()
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(state["c_attn.weight"], before + 1)
    assert torch.equal(other.c_attn.weight, before)
    assert not (model.c_attn.bias == 0).any()


def test_taking_a_split_weight_from_its_module_is_refused() -> None:
    model = split_fused(NanoAttention())
    with pytest.raises(AttributeError, match=r"Linear\.weight is split and cannot be taken .*merge_fused"):
        del model.c_attn.weight
