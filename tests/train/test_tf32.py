"""fp32 means fp32: torch.compile's TF32 stays out of evaluation, measurements and the rest of the process."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from accelerate import Accelerator
from transformers import training_args
from transformers.utils import import_utils

from blockwise_lr import classify, measure_directional, measure_sharpness, param_groups, split_fused
from blockwise_lr.analysis.evaluate import evaluate_run
from blockwise_lr.errors import UserError
from blockwise_lr.fp32 import kept_fp32_precision
from blockwise_lr.integrations.transformers import BlockwiseTrainer
from blockwise_lr.train.config import config_from_dict
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.run import train
from integrations.test_transformers import Tokens, arguments, gpt2


def reads_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.fixture(autouse=True)
def _as_before():
    with kept_fp32_precision():
        yield


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """transformers and accelerate switch TF32 on as they do where there is a GPU for it."""
    import_utils.enable_tf32.cache_clear()
    monkeypatch.setattr(training_args, "is_torch_tf32_available", lambda: True)
    make = Accelerator.__init__

    def made(self, *args, **kwargs):
        make(self, *args, **kwargs)
        torch.backends.cuda.matmul.allow_tf32 = True  # accelerate's line

    monkeypatch.setattr(Accelerator, "__init__", made)
    yield
    import_utils.enable_tf32.cache_clear()


class Seen:
    """Whether TF32 was on in the model's forward pass: in training, and in evaluation."""

    def __init__(self, monkeypatch):
        self.training, self.evaluation = set(), set()
        forward = transformers.LlamaForCausalLM.forward

        def watched(model, *args, **kwargs):
            (self.training if torch.is_grad_enabled() else self.evaluation).add(reads_tf32())
            return forward(model, *args, **kwargs)

        monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", watched)


def test_a_run_computes_in_fp32_and_leaves_the_process_as_it_was(tiny, tmp_path, monkeypatch, as_on_a_gpu):
    seen = Seen(monkeypatch)
    torch.set_float32_matmul_precision("high")  # the process's own, of whatever else it does
    config = replace(tiny, precision="fp32", steps=4, log_every=2, eval_every=2, save_every=4)
    train(config, tmp_path / "run")
    assert torch.get_float32_matmul_precision() == "high"
    evaluate_run(tmp_path / "run")
    assert seen.training == seen.evaluation == {False}
    assert torch.get_float32_matmul_precision() == "high"


def test_tf32_is_for_the_training_steps_alone_where_it_is_asked_for(tiny, tmp_path, monkeypatch, as_on_a_gpu):
    seen = Seen(monkeypatch)
    monkeypatch.setattr("blockwise_lr.train.checks._check_tf32", lambda config: None)
    config = replace(tiny, precision="fp32", tf32=True, steps=4, eval_every=2, save_every=4)
    train(config, tmp_path / "run")
    assert seen.training == {True}
    assert seen.evaluation == {False}
    assert not reads_tf32()
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["train"]["tf32"] is True
    assert about["precision"]["training"] == {"matmul": "tf32", "autocast": None}


@pytest.mark.parametrize(("precision", "autocast"), [("fp32", None), ("bf16", "bfloat16")])
def test_a_run_records_its_precision_and_takes_none_from_the_process(tiny, tmp_path, precision, autocast):
    config = replace(tiny, precision=precision, steps=2, log_every=1, eval_every=1, save_every=0)
    train(config, tmp_path / "alone")
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", torch.bfloat16):
        train(config, tmp_path / "inside")
        assert torch.is_autocast_enabled("cpu")
    about = json.loads((tmp_path / "inside" / "config.json").read_text())
    assert about["precision"] == {
        "training": {"matmul": "ieee", "autocast": autocast},
        "evaluation": {"matmul": "ieee", "autocast": None},
    }
    alone, inside = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("alone", "inside"))
    for row, other in zip(alone, inside, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}


def test_a_run_in_bf16_learns_as_one_in_fp32(tiny, tmp_path):
    """Within another autocast, a run once computed every step with the weights of the first one."""
    for precision in ("fp32", "bf16"):
        train(replace(tiny, precision=precision, steps=48), tmp_path / precision)
    whole, half = (
        [row["train_loss"] for row in read_metrics(tmp_path / precision / "metrics.jsonl")]
        for precision in ("fp32", "bf16")
    )
    assert half == pytest.approx(whole, abs=0.02)
    assert half[-1] < half[0] - 0.5


def test_an_error_in_a_run_leaves_the_precision_of_the_process_as_it_was(tiny, tmp_path, monkeypatch):
    torch.set_float32_matmul_precision("high")
    seen = []

    def interrupted(self, *args, **kwargs):
        seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        raise KeyboardInterrupt

    monkeypatch.setattr(BlockwiseTrainer, "training_step", interrupted)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(KeyboardInterrupt):
            train(replace(tiny, precision="fp32"), tmp_path / "run")
        assert torch.is_autocast_enabled("cpu")
    assert seen == [("highest", False)]
    assert torch.get_float32_matmul_precision() == "high"


def test_a_run_from_before_its_precision_was_recorded_goes_on(tiny, tmp_path):
    config = replace(tiny, steps=4, eval_every=2, save_every=2)
    train(config, tmp_path / "run")
    whole = read_metrics(tmp_path / "run" / "metrics.jsonl")
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    del about["precision"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(about))
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "checkpoint-4" / "manifest.json").unlink()
    train(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in whole]


def test_an_older_configuration_has_none(tiny):
    values = tiny.to_dict()
    del values["tf32"]
    assert config_from_dict(values) == tiny


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"precision": "bf16"},
            "--tf32 is about products in fp32, and --precision is bf16: add --precision fp32, or leave --tf32",
        ),
        ({"precision": "fp32"}, r"--tf32 needs a GPU of compute capability 8\.0 or higher .* leave it out"),
    ],
)
def test_tf32_without_effect_is_refused(tiny, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(replace(tiny, tf32=True, **changes), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, True, False])
def test_torch_compile_switches_tf32_on_in_blockwise_trainer_only_where_it_is_asked_for(
    tmp_path, as_on_a_gpu, asked
):
    settings = arguments(
        tmp_path, max_steps=2, warmup_steps=0, torch_compile=True, torch_compile_backend="eager", tf32=asked
    )
    model = split_fused(gpt2())
    trainer = BlockwiseTrainer(model, settings, train_dataset=Tokens(), eval_dataset=Tokens())
    seen = set()
    model.transformer.wte.register_forward_pre_hook(lambda *args: seen.add(reads_tf32()))
    trainer.train()
    trainer.evaluate()
    assert seen == {bool(asked)}
    assert reads_tf32() is bool(asked)


def test_tf32_that_the_process_has_set_itself_stays(tmp_path):
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = False
    BlockwiseTrainer(split_fused(gpt2()), arguments(tmp_path), train_dataset=Tokens())
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.allow_tf32 is False


@pytest.mark.parametrize("setting", ["high", "transformers'"])
def test_measurements_are_in_full_fp32_whatever_is_set(setting):
    model = split_fused(gpt2())
    ids = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, blocks=classify(model)))
    model(**batch).loss.backward()
    optimizer.step()
    if setting == "high":
        torch.set_float32_matmul_precision("high")
    else:
        torch.backends.fp32_precision = "tf32"
    seen = set()
    model.transformer.wte.register_forward_pre_hook(lambda *args: seen.add(reads_tf32()))
    for estimator in ("fisher", "hutchinson", "empirical"):
        measure_sharpness(model, [batch], estimator=estimator)
    measure_directional(model, optimizer, [batch])
    assert seen == {False}
    assert reads_tf32()


# What else a run sets for the whole process
# ---------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_warnings_and_the_logging_of_libraries_as_they_were(tiny, tmp_path):
    import warnings

    transformers.logging.set_verbosity_info()
    transformers.logging.enable_progress_bar()
    filters = list(warnings.filters)
    try:
        train(replace(tiny, steps=2, eval_every=0, save_every=0), tmp_path / "run")
        evaluate_run(tmp_path / "run")
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
        assert transformers.logging.is_progress_bar_enabled()
        assert warnings.filters == filters
    finally:
        transformers.logging.set_verbosity_warning()
