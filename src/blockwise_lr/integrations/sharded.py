"""Checkpoints of training under ``fully_shard``, for a loop of your own."""

from blockwise_lr.checkpoints.sharded_folder import load_sharded, save_sharded

__all__ = ["load_sharded", "save_sharded"]
