"""Each estimator against what it estimates: in closed form, by dense autograd, and by another library."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

from blockwise_lr import Block, classify, measure_sharpness, split_fused
from sharpness.references import (
    VOCAB,
    by_block,
    gauss_newton_diagonal,
    gpt2,
    hessian_diagonal,
    llama,
    means,
    next_tokens,
    tokens,
)

RUNS, PROBES = 125, 40
MODELS = {"gpt2": gpt2, "gpt2-split": lambda: split_fused(gpt2()), "llama": llama}
EACH_MODEL = ["gpt2", pytest.param("gpt2-split", marks=pytest.mark.slow), "llama"]
MODELS_OF_WITNESSES = {**MODELS, "llama-gelu": lambda: llama(hidden_act="gelu_new")}


@cache
def case(name):
    """The model, a batch, and the means of the exact Gauss-Newton and Hessian diagonals over its blocks."""
    model, batch = MODELS_OF_WITNESSES[name](), tokens()
    exact = (
        by_block(model, gauss_newton_diagonal(model, batch)),
        by_block(model, hessian_diagonal(model, batch)),
    )
    return model, batch, *exact


@cache
def long_run(name, probes):
    """Many draws: for the tests of the mean and of the error bars, since draws are independent by seed and probe."""
    model, batch, *_ = case(name)
    return measure_sharpness(model, batch, loss_fn=next_tokens, probes=probes, seed=2)


def regression(rows=5, inputs=4, classes=3):
    """Softmax regression: the model, a batch, and its probabilities."""
    torch.manual_seed(0)
    model = nn.Linear(inputs, classes).double()
    x, y = torch.randn(rows, inputs, dtype=torch.float64), torch.randint(classes, (rows,))
    return model, x, y, model(x).detach().softmax(-1)


def measured(model, batches, **options):
    """S of the only block that a model without a name for its parts has."""
    report = measure_sharpness(model, batches, blocks=classify(model, {".": Block.HEAD}), **options)
    return report[Block.HEAD]


class Scalar(nn.Module):
    """Logits w * features: one parameter, so its Hessian is its trace."""

    def __init__(self, w=0.7):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))

    def forward(self, features):
        return self.w * features


# Closed forms
# ------------------------------------------------------------------------------------------------------


def regression_trace(x, p):
    """tr(G) of softmax regression with bias, the mean over samples of (||x||^2 + 1) (1 - sum p^2)."""
    return float(((x.square().sum(-1) + 1) * (1 - p.square().sum(-1))).mean())


def test_fisher_is_within_three_standard_errors_of_softmax_regressions_closed_form():
    model, x, y, p = regression()
    found = measured(model, [(x, y)], probes=2500)
    exact = regression_trace(x, p) / found.numel
    assert abs(found.mean - exact) < 3 * found.stderr
    assert found.stderr < 0.02 * exact


def test_fishers_definition_is_exact_when_all_labels_are_enumerated():
    # E over labels from the softmax of B ||g||^2 is the trace: no cross terms are left.
    model, x, _, p = regression(rows=3)
    expected = 0.0
    for labels in itertools.product(range(3), repeat=3):
        chance = float(p[range(3), labels].prod())
        found = measured(model, [(x, torch.tensor(labels))], estimator="empirical")
        expected += chance * found.mean * found.numel
    assert expected == pytest.approx(regression_trace(x, p), rel=1e-12)


def test_empirical_is_the_squared_mean_gradient_times_the_batch():
    model, x, y, p = regression()
    residual = p - functional.one_hot(y, 3)
    weight, bias = residual.T @ x / len(x), residual.mean(0)
    expected = len(x) * (weight.square().sum() + bias.square().sum()) / (weight.numel() + bias.numel())
    assert measured(model, [(x, y)], estimator="empirical").mean == pytest.approx(float(expected), rel=1e-12)


def test_empirical_is_biased_by_the_mean_gradient_and_the_more_the_larger_the_batch():
    # Copies of a sample have no noise at all: B ||g||^2 grows with B, the trace that fisher estimates does not.
    model, x, y, p = regression(rows=1)
    one = measured(model, [(x, y)], estimator="empirical").mean
    eight = (x.expand(8, -1), y.expand(8))
    assert measured(model, [eight], estimator="empirical").mean == pytest.approx(8 * one, rel=1e-12)
    found = measured(model, [eight], probes=2000)
    assert abs(found.mean - regression_trace(x, p) / found.numel) < 3 * found.stderr


@pytest.mark.parametrize("hvp", ["double-backward", "finite-differences"])
def test_hutchinson_is_exact_for_one_parameter(hvp):
    # d2/dw2 of -log softmax(w f)_y is the variance of the features under the softmax.
    model = Scalar()
    features = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = (0.7 * features).softmax(-1)
    variance = (p * features.square()).sum(-1) - (p * features).sum(-1).square()
    found = measured(model, [(features, torch.zeros(6, dtype=torch.int64))], estimator="hutchinson", hvp=hvp)
    tolerance = 1e-12 if hvp == "double-backward" else 1e-8
    assert found.mean == pytest.approx(float(variance.mean()), rel=tolerance)


def test_hutchinson_of_softmax_regression_is_its_gauss_newton_trace():
    model, x, y, p = regression()
    found = measured(model, [(x, y)], estimator="hutchinson", probes=600)
    exact = regression_trace(x, p) / found.numel
    assert abs(found.mean - exact) < 3 * found.stderr
    assert found.stderr < 0.05 * exact


# Dense references
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EACH_MODEL)
def test_fisher_is_within_three_standard_errors_of_the_dense_gauss_newton(name):
    _, _, exact, _ = case(name)
    report = long_run(name, RUNS * PROBES if name == "gpt2" else 800)
    assert set(exact) == {block.value for block in report}
    for block, value in exact.items():
        assert abs(report[block].mean - value) < 3 * report[block].stderr, block
        assert report[block].stderr < 0.04 * value, block


@pytest.mark.parametrize("name", EACH_MODEL)
def test_hutchinson_is_within_three_standard_errors_of_the_dense_hessian(name):
    model, batch, gauss_newton, exact = case(name)
    report = measure_sharpness(model, batch, loss_fn=next_tokens, estimator="hutchinson", probes=200)
    for block, value in exact.items():
        assert abs(report[block].mean - value) < 3 * report[block].stderr, block
    # It is not the Gauss-Newton matrix that it measures: the two are many standard errors apart somewhere.
    apart = [abs(report[block].mean - gauss_newton[block]) / report[block].stderr for block in exact]
    assert max(apart) > 5


@pytest.mark.parametrize(("name", "tolerance"), [("gpt2", 1e-7), ("llama", 1.5e-3)])
def test_finite_differences_give_what_the_double_backward_pass_gives(name, tolerance):
    # LLaMA's norms compute in float32 whatever its parameters are; with a step for float64 it would be 5e-3.
    model, batch, *_ = case(name)
    options = {"loss_fn": next_tokens, "estimator": "hutchinson", "probes": 3}
    twice = measure_sharpness(model, batch, **options, hvp="double-backward")
    differences = measure_sharpness(model, batch, **options, hvp="finite-differences")
    assert means(differences) == pytest.approx(means(twice), rel=tolerance)
    assert twice.method == "trace of the Hessian (double-backward)"
    assert differences.method == "trace of the Hessian (finite-differences)"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_finite_differences_of_float32_models_are_good_to_three_in_a_thousand(name):
    model, batch = MODELS[name]().float(), tokens(rows=4, length=8)
    options = {"estimator": "hutchinson", "probes": 3}
    twice = measure_sharpness(model, batch, **options, hvp="double-backward")
    differences = measure_sharpness(model, batch, **options, hvp="finite-differences")
    assert means(differences) == pytest.approx(means(twice), rel=3e-3)


# The error bars
# ------------------------------------------------------------------------------------------------------


def assert_nominal(hits, confidence):
    """The number of intervals that cover the truth is one that `confidence` explains."""
    # 1 in 1000, because there are two dozen such questions below.
    assert stats.binomtest(int(sum(hits)), len(hits), confidence).pvalue > 0.001, np.mean(hits)


def covered(draws, probes, exact, confidence):
    """Whether the interval of each `probes` draws covers the exact value."""
    runs = np.reshape(draws, (-1, probes))
    errors = runs.std(1, ddof=1) / probes**0.5
    return abs(runs.mean(1) - exact) < stats.t.ppf((1 + confidence) / 2, probes - 1) * errors


@pytest.mark.parametrize("confidence", [0.68, 0.95])
def test_intervals_over_probes_cover_the_dense_gauss_newton_as_often_as_they_claim(confidence):
    _, _, exact, _ = case("gpt2")
    report = long_run("gpt2", RUNS * PROBES)
    for block, value in exact.items():
        assert_nominal(covered(report.draws[Block(block)], PROBES, value, confidence), confidence)


@pytest.mark.parametrize("confidence", [0.68, 0.95])
def test_intervals_of_hutchinson_cover_the_closed_form_as_often_as_they_claim(confidence):
    model, x, y, p = regression()
    blocks = classify(model, {".": Block.HEAD})
    report = measure_sharpness(
        model, [(x, y)], estimator="hutchinson", blocks=blocks, probes=60 * 20, hvp="double-backward"
    )
    exact = regression_trace(x, p) / report[Block.HEAD].numel
    assert_nominal(covered(report.draws[Block.HEAD], 20, exact, confidence), confidence)


@pytest.mark.parametrize("sizes", [[3] * 24, [1, 2, 6] * 8], ids=["equal", "unequal"])
def test_intervals_over_batches_cover_the_sharpness_of_all_data_as_often_as_they_claim(sizes):
    # Batches of fresh data: the report's own standard error, weighted by the batches' sizes.
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    blocks = classify(model, {".": Block.HEAD})
    x = torch.randn(200_000, 3, dtype=torch.float64)
    exact = regression_trace(x, model(x).detach().softmax(-1)) / 12
    confidence, hits = 0.9, []
    quantile = stats.t.ppf((1 + confidence) / 2, len(sizes) - 1)
    for seed in range(80):
        inputs = torch.randn(
            sum(sizes), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        batches = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in inputs.split(sizes)]
        found = measure_sharpness(model, batches, blocks=blocks, seed=seed)[Block.HEAD]
        hits.append(abs(found.mean - exact) < quantile * found.stderr)
    assert_nominal(hits, confidence)


# curvlinops, an independent witness
# ------------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits[:, :-1].flatten(0, 1)


@pytest.mark.parametrize(
    "name", ["gpt2", "llama-gelu"]
)  # SiLU has no forward derivative, which curvlinops needs
def test_curvlinops_has_the_same_diagonals(name):
    from curvlinops import GGNLinearOperator, HessianLinearOperator

    model, batch, gauss_newton, exact_hessian = case(name)
    names, parameters = zip(*model.named_parameters())
    data = [(batch["input_ids"], batch["labels"][:, 1:].flatten())]
    logits = Logits(model)

    for operator, expected in ((GGNLinearOperator, gauss_newton), (HessianLinearOperator, exact_hessian)):
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            matrix = operator(
                logits, nn.CrossEntropyLoss(), list(parameters), data, check_deterministic=False
            )
            diagonal = (matrix @ torch.eye(matrix.shape[1], dtype=torch.float64)).diagonal()
        pieces = diagonal.split([parameter.numel() for parameter in parameters])
        shaped = {n: piece.reshape(p.shape) for n, p, piece in zip(names, parameters, pieces)}
        assert by_block(model, shaped) == pytest.approx(expected, rel=1e-5)


# Hessian-vector products
# ------------------------------------------------------------------------------------------------------


class Sine(torch.autograd.Function):
    """A kernel of one's own; its backward pass is one too, of which autograd knows nothing."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, slope):
        return slope * torch.from_numpy(np.cos(ctx.saved_tensors[0].detach().numpy()))


class SineOnce(Sine):
    backward = staticmethod(torch.autograd.function.once_differentiable(Sine.backward))


class Kernel(Scalar):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, features):
        return self.function(self.w * features)


@pytest.mark.parametrize("function", [Sine, SineOnce])
def test_auto_takes_finite_differences_where_a_double_backward_pass_would_lack_something(function):
    batch = (torch.randn(6, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.int64))
    exact = measured(Kernel(torch.sin), [batch], estimator="hutchinson", hvp="double-backward").mean
    model = Kernel(function.apply)
    blocks = classify(model, {".": Block.HEAD})
    report = measure_sharpness(model, [batch], estimator="hutchinson", blocks=blocks)
    assert report.method == "trace of the Hessian (finite-differences)"
    assert report[Block.HEAD].mean == pytest.approx(exact, rel=1e-7)


def test_a_function_that_says_that_it_has_no_double_backward_pass_is_believed():
    # torch.autograd.grad alone would return another number without a word.
    batch = (torch.randn(6, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.int64))
    message = (
        'marked with @once_differentiable and so has no double backward pass: use hvp="finite-differences"'
    )
    with pytest.raises(RuntimeError, match=message):
        measured(Kernel(SineOnce.apply), [batch], estimator="hutchinson", hvp="double-backward")


@pytest.mark.parametrize("hvp", ["auto", "finite-differences"])
def test_other_errors_are_not_taken_for_a_missing_double_backward_pass(hvp):
    def broken(model, batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measured(Scalar(), [None], estimator="hutchinson", loss_fn=broken, hvp=hvp)


def test_flash_attention_is_replaced_by_a_kernel_that_can_be_differentiated_twice():
    model, batch, *_ = case("gpt2")
    assert model.config._attn_implementation == "sdpa"
    report = measure_sharpness(model, batch, estimator="hutchinson")
    assert report.method == "trace of the Hessian (double-backward)"


def test_finite_differences_of_half_precision_parameters_are_refused():
    message = r"finite differences need float32 or float64 parameters, these are torch.bfloat16: rounding would drown"
    with pytest.raises(ValueError, match=message):
        measure_sharpness(gpt2().bfloat16(), tokens(), estimator="hutchinson", hvp="finite-differences")


def test_finite_differences_through_autocast_inside_the_model_are_refused():
    def cast(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    message = "finite differences need float32 or float64, but the forward pass computes in half precision"
    with pytest.raises(ValueError, match=message):
        measure_sharpness(
            gpt2().float(), tokens(), estimator="hutchinson", hvp="finite-differences", loss_fn=cast
        )


@pytest.mark.parametrize("hvp", ["double-backward", "finite-differences"])
def test_the_callers_autocast_is_off_for_hessians(hvp):
    model, batch = gpt2().float(), tokens()
    expected = measure_sharpness(model, batch, estimator="hutchinson", hvp=hvp)
    with torch.autocast("cpu", torch.bfloat16):
        found = measure_sharpness(model, batch, estimator="hutchinson", hvp=hvp)
    assert means(found) == means(expected)


# The optimizer's second moment
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_optimizer_equals_empirical_when_gradients_do_not_change(kind, name):
    # At learning rate 0 on one batch v / (1 - beta2^t) is the squared mean gradient at every t.
    model, batch = MODELS[name](), tokens()
    adam = kind(model.parameters(), lr=0.0)
    samples = 2 * 4
    for _ in range(5):
        adam.zero_grad()
        model(**batch).loss.backward()
        adam.step()
    found = measure_sharpness(model, estimator="optimizer", optimizer=adam, samples=samples, histogram=True)
    expected = measure_sharpness(model, batch, estimator="empirical", histogram=True)
    assert means(found) == pytest.approx(means(expected), rel=1e-6)
    assert {n: e.mean for n, e in found.per_parameter.items()} == pytest.approx(
        {n: e.mean for n, e in expected.per_parameter.items()}, rel=1e-6
    )
    assert found.samples == expected.samples == samples
    assert {b: len(h.counts) for b, h in found.histograms.items()} == pytest.approx(
        {b: len(h.counts) for b, h in expected.histograms.items()}, abs=2
    )
    for block, histogram in expected.histograms.items():
        assert found.histograms[block].start == pytest.approx(histogram.start, abs=0.11)


def test_optimizer_averages_over_steps_with_adams_weights():
    # One parameter, gradients 1 and 3: v_hat = (beta2 * 1 + 9) (1 - beta2) / (1 - beta2^2).
    model = Scalar()
    adam = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.99))
    for gradient in (1.0, 3.0):
        model.w.grad = torch.tensor([gradient], dtype=torch.float64)
        adam.step()
    found = measured(model, None, estimator="optimizer", optimizer=adam, samples=7)
    assert found.mean == pytest.approx(7 * (0.99 * 1 + 9) * 0.01 / (1 - 0.99**2), rel=1e-12)


def test_optimizer_of_half_precision_parameters_is_read_in_float32():
    model = Scalar().bfloat16()
    adam = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99))
    model.w.grad = torch.full_like(model.w, 0.37)
    adam.step()
    stored = float(adam.state[model.w]["exp_avg_sq"])
    found = measured(model, None, estimator="optimizer", optimizer=adam, samples=3)
    assert found.mean == pytest.approx(3 * stored / 0.01, rel=1e-6)


def test_an_optimizer_without_second_moments_is_refused_by_name():
    model = gpt2()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(**tokens()).loss.backward()
    sgd.step()
    message = (
        r"SGD keeps no second moment \(exp_avg_sq\) of the model's parameter number 0, transformer.wte.weight; "
        r"its state has \['momentum_buffer'\]: expected an Adam-like optimizer of this model that has taken a step"
    )
    with pytest.raises(ValueError, match=message):
        measure_sharpness(model, estimator="optimizer", optimizer=sgd, samples=8)


def test_an_optimizer_that_keeps_no_step_count_with_its_moments_is_refused():
    model = gpt2()
    adam = pytest.importorskip("pytorch_optimizer").AdamP(model.parameters())
    model(**tokens()).loss.backward()
    adam.step()
    with pytest.raises(
        ValueError, match=r"AdamP keeps no step count \(step\) of .*\['exp_avg', 'exp_avg_sq'\]"
    ):
        measure_sharpness(model, estimator="optimizer", optimizer=adam, samples=8)


@pytest.mark.parametrize("whose", ["no step yet", "another model's"])
def test_an_optimizer_that_knows_nothing_of_the_model_is_refused(whose):
    model, other = gpt2(), gpt2()
    trained = model if whose == "no step yet" else other
    adam = torch.optim.AdamW(trained.parameters())
    if trained is other:
        other(**tokens()).loss.backward()
        adam.step()
    with pytest.raises(
        ValueError, match=r"AdamW keeps no second moment .* its state has nothing: expected an Adam-like"
    ):
        measure_sharpness(model, estimator="optimizer", optimizer=adam, samples=8)


def test_the_parameter_that_the_optimizer_does_not_know_is_named_although_fused_ones_have_parts():
    model = gpt2()
    model(**tokens()).loss.backward()
    adam = torch.optim.AdamW([p for n, p in model.named_parameters() if "mlp.c_fc.weight" not in n])
    adam.step()
    with pytest.raises(
        ValueError, match=r"parameter number \d+, transformer.h.0.mlp.c_fc.weight; its state has nothing"
    ):
        measure_sharpness(model, estimator="optimizer", optimizer=adam, samples=8)


def test_every_vocabulary_entry_can_be_sampled():
    # A guard for the tests above: the tiny models are neither certain nor uniform.
    model, batch, *_ = case("gpt2")
    p = next_tokens(model, batch)[0].detach().softmax(-1)
    assert p.shape[-1] == VOCAB
    assert 0.15 < p.max(-1).values.mean() < 0.95
