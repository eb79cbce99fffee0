"""Checks for a GPU that is available for minutes only: costs, correctness, throughput, memory and the paper's size.

`python benchmarks/gpu plan` lists the parts. Nothing has to be installed but torch, transformers, accelerate,
tokenizers and safetensors with what they depend on, and three wheels in pure Python: tyro and its dependencies
docstring_parser and typeguard. stripped.sh tries all parts in an environment that has these packages alone.
"""
