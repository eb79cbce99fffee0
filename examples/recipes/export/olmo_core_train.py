"""OLMo-core: train a LLaMA of 271M parameters with the exported optimizer, on its own example data (C4)."""

from olmo_core.config import DType
from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDatasetConfig, TokenizerConfig
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import CosWithWarmup
from olmo_core.train import (
    Duration,
    TrainerConfig,
    prepare_training_environment,
    teardown_training_environment,
)
from olmo_core.train.train_module import TransformerDataParallelConfig, TransformerTrainModuleConfig
from olmo_core.utils import seed_all

from blocks import optim

LENGTH = 2048
tokenizer = TokenizerConfig.gpt2()
model = TransformerConfig.llama2_271M(vocab_size=tokenizer.padded_vocab_size())
dataset = NumpyFSLDatasetConfig(
    paths=["http://olmo-data.org/examples/c4-en/gpt2/c4-train.00000-00099.npy"],
    sequence_length=LENGTH,
    tokenizer=tokenizer,
    work_dir="dataset-cache",
)
data_loader = NumpyDataLoaderConfig(global_batch_size=128 * LENGTH, seed=0, num_workers=4)  # in tokens
train_module = TransformerTrainModuleConfig(
    rank_microbatch_size=8 * LENGTH,
    max_sequence_length=LENGTH,
    optim=optim,
    scheduler=CosWithWarmup(warmup=100),
    max_grad_norm=1.0,
    dp_config=TransformerDataParallelConfig(
        name=DataParallelType.fsdp, param_dtype=DType.bfloat16, reduce_dtype=DType.float32
    ),
)
trainer = TrainerConfig(save_folder="run", save_overwrite=True, max_duration=Duration.steps(2000))


def main() -> None:
    prepare_training_environment()
    seed_all(0)
    module = train_module.build(model.build(init_device="meta"))
    loader = data_loader.build(dataset.build(), dp_process_group=module.dp_process_group)
    trainer.build(module, loader).fit()
    teardown_training_environment()


if __name__ == "__main__":
    main()
