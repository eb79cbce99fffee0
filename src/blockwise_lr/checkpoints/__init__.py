"""Checkpoints: sealed with a manifest, sharded, or exported as a Hugging Face folder."""
