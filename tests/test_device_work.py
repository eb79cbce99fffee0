"""The counter of kernels and waits sees what it must see."""

import torch

from support import tiny_models
from support.device_work import counted_work


def test_kernels_and_waits_are_counted_outside_forward_and_backward() -> None:
    model = tiny_models.llama()
    tokens = torch.arange(8).reshape(1, 8)
    with counted_work(model) as work:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.autograd.grad(model(input_ids=tokens).logits.sum(), list(model.parameters()))
    # The sum runs outside the model's forward pass, the rest inside one or the other.
    assert work.kernels <= 2, work
    assert work.waits == 0, work

    grads = [p.grad for p in model.parameters() if p.grad is not None]
    with counted_work(model) as work:
        norms = torch._foreach_norm(grads)
        torch.stack(norms).tolist()
        float(norms[0])
        norms[0].to("cpu")
        norms[0].view(1)
    assert work.operators == {"_foreach_norm": 1, "stack": 1}, work
    assert work.waits_of == {"tolist": 1, "_local_scalar_dense": 1, "to": 1}, work


def test_a_boolean_index_and_a_condition_are_waits() -> None:
    values = torch.arange(4.0)
    with counted_work() as work:
        values[values > 2]
        if values.sum() > 2:
            pass
    assert work.waits >= 2, work
