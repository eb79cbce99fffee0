"""measure_sharpness: what must not change the answer, what it leaves as it was, and what it refuses."""

from __future__ import annotations

import re
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from blockwise_lr import Block, classify, measure_sharpness, merge_fused, split_fused
from sharpness.references import VOCAB, gpt2, llama, means, next_tokens, spread, tokens
from support.architectures import build
from support.nano import NanoGPT

ESTIMATORS = {
    "fisher": {},
    "empirical": {"estimator": "empirical"},
    "hutchinson": {"estimator": "hutchinson", "hvp": "double-backward"},
    "finite-differences": {"estimator": "hutchinson", "hvp": "finite-differences"},
}
each_estimator = pytest.mark.parametrize("options", ESTIMATORS.values(), ids=ESTIMATORS)
# Those whose draws do not depend on how the parameters are cut up.
each_gradient = pytest.mark.parametrize(
    "options", [{}, {"estimator": "empirical"}], ids=["fisher", "empirical"]
)


def by_parameter(report):
    return {name: estimate.mean for name, estimate in report.per_parameter.items()}


def same(first, second, tolerance=1e-12):
    assert means(first) == pytest.approx(means(second), rel=tolerance)
    # Some gradients are 0 but for rounding, as those of the keys' biases.
    rounding = tolerance * max(map(abs, by_parameter(second).values()))
    assert by_parameter(first) == pytest.approx(by_parameter(second), rel=tolerance, abs=rounding)
    assert first.samples == second.samples


# What must not matter
# ------------------------------------------------------------------------------------------------------


def loss_of(reduction):
    def loss(model, batch):
        logits, labels = next_tokens(model, batch)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)

    return loss


def as_module(model, batch):
    logits, labels = next_tokens(model, batch)
    return nn.CrossEntropyLoss()(logits.movedim(-1, 1), labels)


def as_log_likelihood(model, batch):
    logits, labels = next_tokens(model, batch)
    return functional.nll_loss(logits.log_softmax(-1).flatten(0, 1), labels.flatten())


@each_estimator
@pytest.mark.parametrize("loss", [*map(loss_of, ["mean", "sum", "none"]), as_module, as_log_likelihood])
def test_sharpness_does_not_depend_on_how_the_loss_is_written(options, loss):
    model, batch = gpt2(), tokens()
    expected = measure_sharpness(model, batch, loss_fn=next_tokens, **options)
    tolerance = 1e-6 if options.get("hvp") == "finite-differences" else 1e-10
    same(measure_sharpness(model, batch, loss_fn=loss, **options), expected, tolerance)


@each_gradient
@pytest.mark.parametrize("build", [gpt2, llama])
def test_the_models_own_loss_gives_the_same_in_float32(options, build):
    model, batch = build(), tokens()
    expected = measure_sharpness(model, batch, loss_fn=next_tokens, **options)
    same(measure_sharpness(model, batch, **options), expected, 1e-5)  # transformers casts logits to float32


@pytest.mark.parametrize("arguments", [{}, {"num_items_in_batch": 3}])
def test_the_models_own_reduction_does_not_matter(arguments):
    model, batch = llama(), tokens()
    same(measure_sharpness(model, {**batch, **arguments}), measure_sharpness(model, batch))


@each_gradient
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_count(options, side):
    # One sequence alone, and beside a longer one whose labels are all ignored.
    model = llama()
    short, long = tokens(rows=1, length=4, seed=1), tokens(rows=1, length=6, seed=2)
    at = slice(0, 4) if side == "right" else slice(2, 6)
    ids, labels, mask = (
        long["input_ids"].repeat(2, 1),
        torch.full((2, 6), -100),
        torch.ones(2, 6, dtype=torch.int64),
    )
    ids[1], mask[1] = 0, 0
    ids[1, at], labels[1, at], mask[1, at] = short["input_ids"], short["labels"], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}
    if side == "left":
        padded["labels"][1, 2] = -100  # what the last padding predicts does not count either
    found = measure_sharpness(model, padded, **options)
    assert found.samples == 3
    same(found, measure_sharpness(model, short, **options), 1e-6)


def keeping(change):
    """A loss whose rows without a mask `change` removes, from (losses, mask) of shape (rows, length)."""

    def loss(model, batch):
        logits, labels = next_tokens(model, batch)
        losses = functional.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
        return change(losses, torch.arange(labels.numel()).view_as(labels) % 3 > 0)

    return loss


def written_over(losses, mask):
    losses[~mask] = 0
    return losses.mean()


@each_estimator
@pytest.mark.parametrize(
    "change",
    [
        lambda losses, mask: (losses * mask).sum() / mask.sum(),
        lambda losses, mask: losses[mask].mean(),
        lambda losses, mask: {"loss": ((losses * mask).sum(1) / mask.sum(1)).mean()},
        lambda losses, mask: (losses.detach(), torch.where(mask, losses, 0).sum()),
        lambda losses, mask: losses * mask,
        written_over,
    ],
)
def test_rows_that_a_mask_leaves_out_of_the_loss_do_not_count(options, change):
    def ignoring(model, batch):
        logits, labels = next_tokens(model, batch)
        mask = torch.arange(labels.numel()).view_as(labels) % 3 > 0
        return logits, labels.masked_fill(~mask, -100)

    model, batch = gpt2(), tokens()
    found = measure_sharpness(model, batch, loss_fn=keeping(change), **options)
    expected = measure_sharpness(model, batch, loss_fn=ignoring, **options)
    same(found, expected, 1e-6 if options.get("hvp") == "finite-differences" else 1e-10)


def test_a_batch_that_a_mask_leaves_out_is_refused():
    def nothing(losses, mask):
        return losses[mask & ~mask].mean()

    with pytest.raises(ValueError, match="no label of the batch counts"):
        measure_sharpness(gpt2(), tokens(), loss_fn=keeping(nothing))


def test_a_mask_leaves_out_rows_whose_labels_are_probabilities_too():
    def loss(select):
        def masked(model, batch):
            logits, labels = next_tokens(model, batch)
            odds = functional.one_hot(labels, logits.shape[-1]).to(logits) * 0.5 + 0.5 / logits.shape[-1]
            losses = functional.cross_entropy(
                logits.movedim(-1, 1), odds.movedim(-1, 1), reduction="none", label_smoothing=0.1
            )
            return select(losses)

        return masked

    model, batch = gpt2(), tokens()
    first = {name: value[:1] for name, value in batch.items()}
    found = measure_sharpness(model, batch, loss_fn=loss(lambda each: each[0].mean()), estimator="empirical")
    expected = measure_sharpness(model, first, loss_fn=loss(torch.mean), estimator="empirical")
    same(found, expected, 1e-10)


@pytest.mark.parametrize("label", [-1, 10_000])
def test_a_label_that_is_no_class_is_refused(label):
    def padded(model, batch):
        logits, labels = next_tokens(model, batch)
        return logits, labels.index_fill(1, torch.tensor([0]), label)

    with pytest.raises(
        ValueError, match=r"^\d+ labels are below 0, or not below the number of classes; expected"
    ):
        measure_sharpness(gpt2(), tokens(), loss_fn=padded)


def test_a_masked_language_model_is_measured_on_its_masked_tokens():
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    model = spread(BertForMaskedLM(BertConfig(vocab_size=11, max_position_embeddings=8, **sizes)))
    batch = tokens(rows=3, length=6, vocab=11)
    masked = torch.zeros(3, 6, dtype=torch.bool)
    masked[0, 1] = masked[1, 4] = masked[2, 0] = masked[2, 5] = True
    batch["labels"][~masked] = -100
    names = {
        r"attention\.output\.dense": Block.VO,
        r"(intermediate|output)\.dense": Block.FFN,
        "transform": Block.HEAD,
    }
    options = {"blocks": classify(model, names)}
    report = measure_sharpness(model, batch, estimator="empirical", **options)
    assert measure_sharpness(model, batch, **options).samples == report.samples == 4
    logits = model(batch["input_ids"]).logits
    loss = functional.cross_entropy(logits[masked], batch["labels"][masked])
    head = model.cls.predictions.bias
    expected = 4 * torch.autograd.grad(loss, head)[0].square().mean()
    assert report.per_parameter["cls.predictions.bias"].mean == pytest.approx(float(expected), rel=1e-5)
    assert {"emb", "qk", "vo", "ffn", "norm"} <= {block.value for block in report}


def images(count=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=generator), torch.tensor([0, 2, 1])[
        :count
    ]


@each_estimator
def test_an_image_classifier_of_transformers_is_measured(options):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    model = spread(ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)))
    pixels, labels = images()
    options = {**options, "blocks": classify(model, {"cls_token": Block.EMB})}
    named = measure_sharpness(model, {"pixel_values": pixels, "labels": labels}, **options)
    paired = measure_sharpness(model, [(pixels, labels)], **options)
    same(named, paired, 1e-6)
    assert named.samples == 3
    assert {"qk", "vo", "ffn", "norm", "head"} <= {block.value for block in named}
    assert any(layer.endswith(".0") for layer in named.per_layer)


class Convolutions(nn.Sequential):
    """Images in, a class for every pixel out: logits (N, C, height, width)."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 5, 1))


@each_estimator
def test_dense_predictions_count_every_pixel_that_has_a_label(options):
    torch.manual_seed(0)
    model = Convolutions().double()
    pixels, _ = images()
    labels = torch.randint(5, (3, 8, 8), generator=torch.Generator().manual_seed(1))
    labels[:, 4:] = -100
    options = {**options, "blocks": classify(model, {".": Block.CONV})}
    found = measure_sharpness(model, [(pixels, labels)], **options)
    assert found.samples == 3 * 4 * 8

    def by_hand(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1])

    same(measure_sharpness(model, [(pixels, labels)], loss_fn=by_hand, **options), found)


def test_a_mixtures_balance_is_no_part_of_the_sharpness():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 10.0}
    config = MixtralConfig(num_hidden_layers=1, vocab_size=VOCAB, **sizes, **experts)
    model, batch = spread(MixtralForCausalLM(config), dtype=torch.float32), tokens()
    expected = measure_sharpness(model, batch)
    assert {"router", "ffn"} <= {block.value for block in expected}
    assert model(**batch, output_router_logits=True).aux_loss > 0
    same(measure_sharpness(model, {**batch, "output_router_logits": True}), expected)


def test_tied_embeddings_count_once_and_frozen_parameters_not_at_all():
    model, batch = gpt2(), tokens()
    whole = measure_sharpness(model, batch, estimator="empirical")
    assert whole[Block.EMB].numel == VOCAB * 4
    assert "lm_head.weight" not in whole.per_parameter
    model.transformer.wte.weight.requires_grad_(False)
    for parameter in model.transformer.h[0].ln_1.parameters():
        parameter.requires_grad_(False)
    rest = measure_sharpness(model, batch, estimator="empirical")
    assert Block.EMB not in rest
    assert "transformer.h.0.ln_1.weight" not in rest.per_parameter
    assert by_parameter(rest) == pytest.approx(
        {name: mean for name, mean in by_parameter(whole).items() if name in rest.per_parameter}, rel=1e-12
    )


@each_gradient
def test_parts_of_a_fused_weight_are_told_apart_whether_it_was_split_or_not(options):
    model, batch = gpt2(), tokens()
    fused = measure_sharpness(model, batch, probes=1, loss_fn=next_tokens, histogram=True, **options)
    split = measure_sharpness(split_fused(model), batch, loss_fn=next_tokens, histogram=True, **options)
    assert means(fused) == pytest.approx(means(split), rel=1e-12)
    layer = "transformer.h.0.attn"
    for kind in ("weight", "bias"):
        for index, part in enumerate("qkv"):
            a = fused.per_parameter[f"{layer}.c_attn.{kind}:{part}"]
            b = split.per_parameter[f"{layer}.c_attn.parametrizations.{kind}.original{index}"]
            assert a.mean == pytest.approx(b.mean, rel=1e-12)
            assert a.numel == b.numel
    assert fused.histograms == split.histograms
    same(measure_sharpness(merge_fused(model), batch, loss_fn=next_tokens, **options), fused)


@each_gradient
@pytest.mark.parametrize("build", [gpt2, llama])
def test_accumulated_micro_batches_are_one_batch(options, build):
    model, batch = build(), tokens(rows=5)
    micro = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 5))]
    probes = {} if options else {"probes": 3}
    whole = measure_sharpness(model, batch, loss_fn=next_tokens, **options, **probes, histogram=True)
    parts = measure_sharpness(
        model, micro, loss_fn=next_tokens, accumulate=2, **options, **probes, histogram=True
    )
    same(parts, whole, 1e-5 if build is llama else 1e-12)  # LLaMA's norms compute in float32
    assert parts.batches == whole.batches == 1
    assert {b: sum(h.counts) + h.zeros for b, h in parts.histograms.items()} == {
        b: e.numel for b, e in whole.items()
    }


def test_accumulated_micro_batches_are_one_batch_for_hessians_too():
    model, batch = gpt2(), tokens(rows=4)
    micro = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    options = {"estimator": "hutchinson", "loss_fn": next_tokens}
    same(
        measure_sharpness(model, micro, accumulate=2, **options),
        measure_sharpness(model, batch, **options),
        1e-10,
    )


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"probes": 20}, 0.02), ({"estimator": "empirical"}, 0.01)],
    ids=["fisher", "empirical"],
)
def test_half_precision_costs_less_than_the_error_bars(options, tolerance):
    # Measured: 0.1 % at initialisation, 1 % after 60 steps; of fisher up to 3 % then, because rounding moves labels.
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
    model, batch = LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)), tokens(rows=8, length=32, vocab=97)
    expected = measure_sharpness(model, batch, **options)
    found = measure_sharpness(deepcopy(model).bfloat16(), batch, **options)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = measure_sharpness(model, batch, **options)
    assert means(found) == pytest.approx(means(expected), rel=tolerance)
    assert means(autocast) == pytest.approx(means(expected), rel=tolerance)


def test_micro_batches_of_a_bfloat16_model_are_added_up_in_float32():
    # 64 gradients, each a hundredth of their sum: bfloat16 would lose the late ones.
    model, batch = gpt2().bfloat16(), tokens()
    options = {"estimator": "empirical", "histogram": True}
    once = measure_sharpness(model, batch, **options)
    often = measure_sharpness(model, [batch] * 64, accumulate=64, **options)
    assert {block: mean / 64 for block, mean in means(often).items()} == pytest.approx(means(once), rel=1e-6)


def test_the_seed_alone_decides():
    model, batch = gpt2(), tokens()
    first = measure_sharpness(model, batch, seed=3)
    torch.manual_seed(123)
    assert means(measure_sharpness(model, batch, seed=3)) == means(first)
    assert means(measure_sharpness(model, batch, seed=4)) != means(first)
    # Batches and probes each have numbers of their own.
    twice = measure_sharpness(model, [batch, batch], probes=2, seed=3)
    assert (
        len({*measure_sharpness(model, batch, probes=2, seed=3).draws[Block.FFN], *twice.draws[Block.FFN]})
        == 4
    )


def test_batches_count_in_proportion_to_their_samples():
    model = gpt2()
    batches = [tokens(rows=1, length=3), tokens(rows=2, length=8, seed=1)]
    each = [measure_sharpness(model, batch, estimator="empirical") for batch in batches]
    both = measure_sharpness(model, batches, estimator="empirical")
    assert [report.samples for report in each] == [2, 14]
    assert both.weights == [2 / 16, 14 / 16]
    for block in both:
        assert both[block].mean == pytest.approx((2 * each[0][block].mean + 14 * each[1][block].mean) / 16)


@each_estimator
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(options, context):
    model, batch = gpt2(), tokens()
    expected = measure_sharpness(model, batch, **options)
    with context():
        batch = tokens()  # made here, as an evaluation's batches are
        assert means(measure_sharpness(model, batch, **options)) == means(expected)


def test_an_evaluation_under_autocast_just_before_changes_nothing():
    # Autocast keeps the weights it has cast, and those cast under no_grad have no graph.
    model, batch = gpt2().float(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        expected = measure_sharpness(model, batch)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(**batch)
        assert means(measure_sharpness(model, batch)) == means(expected)


def test_weights_that_changed_within_the_callers_autocast_are_measured_as_they_are():
    model, batch = gpt2().float(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        before = measure_sharpness(model, batch)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        after = measure_sharpness(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert means(after) == means(measure_sharpness(model, batch)) != means(before)


@pytest.mark.parametrize("how", ["torch.compile", "module.compile", "a compiled layer"])
@each_estimator
def test_compiled_models_are_measured_as_they_are_without(options, how):
    torch.manual_seed(0)
    plain = NanoGPT().double()
    options = {**options, "loss_fn": lambda model, ids: (model(ids)[:, :-1], ids[:, 1:])}
    ids = torch.arange(12).reshape(2, 6)
    expected = measure_sharpness(plain, [ids], **options)
    compiled = deepcopy(plain)
    if how == "torch.compile":
        compiled = torch.compile(compiled, backend="aot_eager")
        assert torch.equal(compiled(ids), plain(ids))
    elif how == "module.compile":
        compiled.compile(backend="aot_eager")
    else:
        compiled.transformer.h[0] = torch.compile(compiled.transformer.h[0], backend="aot_eager")
    found = measure_sharpness(compiled, [ids], **options)
    same(found, expected, 1e-10)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_ones_own_is_measured(reentrant):
    class Checkpointed(NanoGPT):
        def forward(self, ids):
            return checkpoint(super().forward, ids, use_reentrant=reentrant, preserve_rng_state=False)

    torch.manual_seed(0)
    plain = NanoGPT().double()
    model = Checkpointed().double()
    model.load_state_dict(plain.state_dict())
    ids = torch.arange(12).reshape(2, 6)
    options = {"loss_fn": lambda model, ids: (model(ids)[:, :-1], ids[:, 1:]), "probes": 2}
    if reentrant:
        with pytest.raises(ValueError, match="the logits do not depend on the parameters"):
            measure_sharpness(model, [ids], **options)
    else:
        same(measure_sharpness(model, [ids], **options), measure_sharpness(plain, [ids], **options))


# The model is left as it was
# ------------------------------------------------------------------------------------------------------


def state_of(model):
    """All that a measurement could disturb."""
    return {
        "parameters": [p.detach().clone() for p in model.parameters()],
        "buffers": [b.clone() for b in model.buffers()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "random": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),
        "modes": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad_enabled": torch.is_grad_enabled(),
    }


def assert_same_state(before, after):
    for name, value in before.items():
        others = after[name]
        if isinstance(value, list) and any(isinstance(x, torch.Tensor) for x in value):
            for x, y in zip(value, others, strict=True):
                assert (x is None) == (y is None), name
                assert x is None or torch.equal(x, y), name
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, others), name
        else:
            assert np.array_equal(value, others), name


def training_model():
    """In the middle of training: dropout, a frozen layer in eval mode, gradients that wait for the optimizer."""
    model = gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    model.transformer.h[0].mlp.eval()
    model.transformer.h[0].ln_2.weight.requires_grad_(False)
    model(**tokens(seed=5)).loss.backward()
    model.transformer.wpe.weight.grad = None
    return model


@each_estimator
def test_the_model_and_all_random_states_are_left_as_they_were(options):
    model = training_model()
    before = state_of(model)
    gradients = [p.grad for p in model.parameters()]
    report = measure_sharpness(model, [tokens(), tokens(seed=1)], **options)
    assert_same_state(before, state_of(model))
    assert all(p.grad is kept for p, kept in zip(model.parameters(), gradients))
    # And it was measured without dropout.
    assert means(measure_sharpness(deepcopy(model).eval(), [tokens(), tokens(seed=1)], **options)) == means(
        report
    )


@each_estimator
@pytest.mark.parametrize("call", [1, 2, 3])
def test_the_model_is_left_as_it_was_when_a_batch_raises(options, call):
    # For finite differences the second and third calls come while the parameters are displaced.
    model, calls = training_model(), []

    def breaking(model, batch):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return next_tokens(model, batch)

    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        measure_sharpness(model, [tokens()] * 3, loss_fn=breaking, **options)
    assert len(calls) == call
    assert_same_state(before, state_of(model))


def test_running_statistics_do_not_move():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).double()
    before = state_of(model)
    options = {"blocks": classify(model, {".": Block.OTHER})}
    measure_sharpness(model, [images()], **options)
    assert_same_state(before, state_of(model))


@each_gradient
@pytest.mark.parametrize("kind", ["rwkv", "xlstm", "llama"])
def test_no_model_of_transformers_writes_into_a_cache(options, kind):
    model, batch = build(kind), tokens()
    expected = measure_sharpness(model, {**batch, "use_cache": False}, **options)
    same(measure_sharpness(model, batch, **options), expected)
    assert model.config.use_cache


@each_estimator
@pytest.mark.parametrize("through", ["tensor", "data"])
def test_buffers_that_a_forward_pass_writes_into_get_their_values_back(options, through):
    # As the counters by which a mixture of experts balances its load.
    class Counting(NanoGPT):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.tensor([3]))
            self.register_buffer("shared", torch.zeros(1).expand(4))

        def forward(self, ids):
            counter = self.seen if through == "tensor" else self.seen.data
            counter += ids.numel()
            return super().forward(ids)

    torch.manual_seed(0)
    model = Counting().double()
    with torch.inference_mode():
        model.register_buffer("cached", torch.zeros(2))
    ids = torch.arange(12).reshape(2, 6)
    model(ids)
    before = state_of(model)
    measure_sharpness(model, [ids], loss_fn=lambda model, ids: (model(ids)[:, :-1], ids[:, 1:]), **options)
    assert_same_state(before, state_of(model))


def test_reading_the_optimizer_changes_nothing():
    model = training_model()
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**tokens()).loss.backward()
    adam.step()
    before, state = state_of(model), deepcopy(adam.state_dict())
    measure_sharpness(model, estimator="optimizer", optimizer=adam, samples=8, histogram=True)
    assert_same_state(before, state_of(model))
    torch.testing.assert_close(adam.state_dict(), state, rtol=0, atol=0)


def test_a_shuffled_loader_does_not_move_the_global_random_state():
    model = gpt2()
    rows = [{name: value[0] for name, value in tokens(rows=1, seed=seed).items()} for seed in range(4)]
    loader = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)
    before = torch.get_rng_state()
    assert measure_sharpness(model, loader).batches == 2
    assert torch.equal(torch.get_rng_state(), before)


# Batches
# ------------------------------------------------------------------------------------------------------


def test_what_the_report_says_of_the_measurement():
    model = gpt2()
    report = measure_sharpness(
        model, [tokens(seed=i) for i in range(5)], max_batches=4, probes=3, seed=7, step=20
    )
    assert (report.batches, report.probes, report.samples) == (4, 3, 4 * 8)
    assert (report.seed, report.step, report.estimator) == (7, 20, "fisher")
    assert report.stderr_over == "batches"
    assert report.method == "Gauss-Newton trace, labels sampled from the model's softmax"
    assert measure_sharpness(model, tokens(), probes=2).stderr_over == "probes"
    alone = measure_sharpness(model, tokens())
    assert alone.stderr_over is None
    assert all(np.isnan(estimate.stderr) for estimate in alone.values())


def test_progress_is_reported_after_every_accumulated_batch():
    done = []
    measure_sharpness(gpt2(), (tokens(seed=i) for i in range(7)), accumulate=2, on_batch=done.append)
    assert done == [1, 2, 3]  # the seventh would be half a batch


def test_no_more_batches_are_taken_than_measured():
    each = iter([tokens(seed=i) for i in range(5)])
    measure_sharpness(gpt2(), each, max_batches=2, accumulate=2)
    assert len(list(each)) == 1


# What is refused
# ------------------------------------------------------------------------------------------------------

ADAM = torch.optim.Adam([torch.zeros(1)])
REFUSED = [
    (
        {"estimator": "hessian"},
        "estimator is 'hessian'; expected one of fisher, empirical, hutchinson, optimizer",
    ),
    ({"probes": 0}, "probes is 0; expected 1 or more"),
    ({"accumulate": 0}, "accumulate is 0; expected 1 or more"),
    ({"max_batches": 0}, "max_batches is 0; expected 1 or more"),
    ({"seed": -1}, "seed is -1; expected 0 or more"),
    ({"batches": None}, 'estimator="fisher" needs batches'),
    ({"batches": []}, "batches is empty; expected at least one batch"),
    ({"batches": [tokens()] * 2, "accumulate": 3}, "accumulate is 3, but there are only 2 batches"),
    (
        {"estimator": "empirical", "probes": 2},
        'probes is 2, but nothing is drawn at random with estimator="empirical"',
    ),
    (
        {"estimator": "optimizer", "probes": 2, "optimizer": ADAM, "samples": 1},
        'probes is 2, but nothing is drawn at random with estimator="optimizer"',
    ),
    (
        {"estimator": "hutchinson", "histogram": True},
        'histogram=True is for squared gradients; estimator="hutchinson" has none',
    ),
    (
        {"estimator": "hutchinson", "hvp": "double_backward"},
        "hvp is 'double_backward'; expected one of auto, double-backward, finite-differences",
    ),
    (
        {"hvp": "finite-differences"},
        "hvp is 'finite-differences', but estimator=\"fisher\" has no Hessian-vector products",
    ),
    ({"optimizer": ADAM}, 'optimizer and samples are for estimator="optimizer", not for "fisher"'),
    (
        {"estimator": "empirical", "samples": 3},
        'optimizer and samples are for estimator="optimizer", not for "empirical"',
    ),
    (
        {"estimator": "optimizer"},
        'estimator="optimizer" needs optimizer=... and samples=..., the predicted tokens in one optimizer '
        "step's batch (given: optimizer NoneType, samples None)",
    ),
    (
        {"estimator": "optimizer", "optimizer": ADAM, "samples": 0},
        "step's batch (given: optimizer Adam, samples 0)",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_arguments_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        measure_sharpness(gpt2(), **{"batches": tokens(), **options})


@each_estimator
def test_a_batch_of_padding_alone_is_refused(options):
    batch = tokens()
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="no label of the batch counts .* leave such batches out"):
        measure_sharpness(gpt2(), batch, **options)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(
        ValueError, match="GPT2LMHeadModel has no parameter with requires_grad=True, so there is nothing"
    ):
        measure_sharpness(gpt2().requires_grad_(False), tokens())


def test_a_model_that_the_rules_do_not_know_is_refused_as_by_classify():
    with pytest.raises(ValueError, match="2 parameters belong to no block that the rules know:\n  0.weight"):
        measure_sharpness(nn.Sequential(nn.Linear(4, 3)), [(torch.zeros(2, 4), torch.tensor([0, 1]))])


def test_a_diverged_model_is_refused_by_every_estimator_that_runs_it():
    model = gpt2()
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] = float("nan")
    for options in ESTIMATORS.values():
        with pytest.raises(ValueError, match="the logits are not finite"):
            measure_sharpness(model, tokens(), **options)


def test_ddp_is_looked_through(tmp_path):
    # On one process: what it does on several is in test_distributed.py.
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, batch = gpt2(), tokens()
        same(measure_sharpness(DistributedDataParallel(model), batch), measure_sharpness(model, batch))
    finally:
        torch.distributed.destroy_process_group()
