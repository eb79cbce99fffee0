"""torchtitan: export one pattern for each group, and build torchtitan's optimizer from them where it is installed."""

from transformers import LlamaConfig, LlamaForCausalLM

from blockwise_lr.export import export_rates

BASE_LR = 1.5e-4  # for ratios="measured": a quarter of a tuned uniform learning rate

model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
)
# By default, the patterns are for the names of torchtitan's own LLaMA.
print(export_rates(model, "torchtitan", lr=BASE_LR, ratios="measured").text)

try:
    import torchtitan.components.optimizer  # noqa: F401
except ImportError as error:
    print(f"torchtitan is not installed ({error}): the patterns were checked by its rule, without it")
else:
    # The model here is transformers', so this time the names are the model's.
    exported = export_rates(model, "torchtitan", lr=BASE_LR, ratios="measured", names="model")
    defined = {}
    exec(exported.text, defined)
    defined["optimizer"].implementation = "for-loop"  # the default needs CUDA
    built = defined["optimizer"].build(model_parts=[model])
    rates = [group["lr"] for optimizer in built.optimizers for group in optimizer.param_groups]
    assert rates == [group.lr_ratio * BASE_LR for group in exported.groups]
    print("torchtitan's learning rates:", rates)
