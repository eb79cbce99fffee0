"""Optimizers that accept groups by block, and the transfer of state from one optimizer to another."""

from blockwise_lr.optimizers.adam_mini import AdamMini
from blockwise_lr.optimizers.muon import Muon
from blockwise_lr.optimizers.registry import OPTIMIZERS, build_optimizer, optimizer_entry
from blockwise_lr.optimizers.state_transfer import adopt_state

__all__ = ["OPTIMIZERS", "AdamMini", "Muon", "adopt_state", "build_optimizer", "optimizer_entry"]
