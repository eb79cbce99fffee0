"""Checkpoints: whole or absent, sharded, or exported as a Hugging Face folder."""
