"""Blockwise learning rates inside other people's trainers."""
