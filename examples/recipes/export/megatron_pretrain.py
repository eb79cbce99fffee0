"""Run Megatron-LM's pretrain_gpt.py, in its folder, with the exported overrides in place of its own."""

import runpy

from megatron.training import training

from blocks import block_overrides

own = training.get_megatron_optimizer_config


def with_block_overrides(args):
    config, _ = own(args)
    return config, block_overrides


training.get_megatron_optimizer_config = with_block_overrides
runpy.run_path("pretrain_gpt.py", run_name="__main__")
