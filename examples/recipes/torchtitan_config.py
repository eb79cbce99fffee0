"""torchtitan: export one pattern for each group, as Python for a config_registry.py."""

from transformers import LlamaConfig, LlamaForCausalLM

from blockwise_lr.export import export_rates

BASE_LR = 6e-4  # the learning rate that you tuned for one rate

model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
)
# By default, the patterns are for the names of torchtitan's own LLaMA; names="model" keeps those of `model`.
exported = export_rates(model, "torchtitan", lr=BASE_LR)
print(exported.text)
assert exported.lost == ()  # torchtitan can express every block
