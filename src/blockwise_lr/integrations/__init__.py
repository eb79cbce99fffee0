"""Blockwise learning rates for trainers of other libraries, such as transformers' Trainer."""
