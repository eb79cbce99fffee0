"""Adam-mini: AdamW with one second moment per head of queries and keys, and one per output of other matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from blockwise_lr.distributed import is_sharded, local, sharded_like
from blockwise_lr.fp32 import HALF
from blockwise_lr.optim.gradients import stack_scalars
from blockwise_lr.optimizers.adam_mini_compiled import compiled_step
from blockwise_lr.optimizers.adam_mini_kernel import foreach_step
from blockwise_lr.optimizers.adam_mini_sharded import is_whole, sharded_step, sharded_zeros
from blockwise_lr.optimizers.adam_mini_views import StepInputs
from blockwise_lr.optimizers.added_groups import (
    check_dense_and_real,
    name_in_group,
    own_states_only,
    read_group,
)


class AdamMini(Optimizer):
    r"""Adam-mini on groups of :func:`blockwise_lr.param_groups`: the update of AdamW with far fewer second moments.

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) mean(g^2), the mean over a piece: a head, an output, or a whole norm gain
        theta <- theta - lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay theta)

    The pieces follow from the model itself (:class:`blockwise_lr.blocks.block.Structure`), not from parameter names.
    Head sizes, grouped queries, latent attention, split fused weights, Conv1D and stacks of experts are therefore
    handled.

    The state has one number per element of a parameter (m) and about one per row (v), always in float32. For float32
    parameters this is half of AdamW's state. For bf16 and fp16 parameters it is as large as the state of torch's AdamW,
    which keeps two moments in the parameters' dtype: 4 bytes per element. The memory of weights, gradients and
    activations is unchanged. A step updates a few million elements at a time, so its temporary tensors need 8 MiB on a
    CPU and 32 MiB on a GPU, whatever the size of the model.

    Args:
        params: groups of :func:`blockwise_lr.param_groups`. Groups from elsewhere need the key ``partitions``: for each
            parameter, the number of pieces along each of its dimensions.
        lr: learning rate of groups without their own. Default 1e-3.
        betas: decay rates of the first and the second moment. Default (0.9, 0.95), as for AdamW in the paper.
        eps: added to the square root of the second moment. Default 1e-8.
        weight_decay: decoupled weight decay of groups without their own. Default 0.1.
        maximize: maximise the objective. Default False.
        compile: use torch.compile. The first step then takes some seconds longer, and later steps make one pass over
            memory in place of three. Default False.
        differentiable: exists for compatibility with torch; True raises an error.

    Raises:
        ValueError: a hyperparameter is out of range; a group has no ``partitions``; or the pieces of a parameter are
            unknown (a fused weight that is not split, or an attention module that does not state its number of heads).
        RuntimeError: raised by ``step`` for sparse or complex gradients.

    Example:
        >>> from blockwise_lr import param_groups
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.LayerNorm(4))
        >>> optimizer = AdamMini(param_groups(model, lr=1e-3), lr=1e-3)
        >>> model(torch.arange(3)).square().sum().backward(); optimizer.step()
        >>> [tuple(state["exp_avg_sq"].shape) for state in optimizer.state.values()]
        [(1,), (4,), (10, 1)]

    Source: Adam-mini, Zhang et al., arXiv 2406.16793, algorithm 1, and its reference implementation 1.1.1.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        maximize: bool = False,
        compile: bool = False,
        differentiable: bool = False,
    ) -> None:
        if differentiable:
            raise ValueError("AdamMini has no differentiable step: leave out differentiable=True")
        _check("lr", float(lr), float(lr) >= 0, "0 or above")
        _check("eps", eps, eps >= 0, "0 or above")
        _check("weight_decay", weight_decay, weight_decay >= 0, "0 or above")
        for beta in betas:
            _check("betas", betas, 0 <= beta < 1, "two numbers from 0 to below 1")
        settings = {"betas": betas, "eps": eps, "maximize": maximize, "compile": compile}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **settings})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, and store in it the number of pieces of each parameter (``partitions``).

        Raises:
            ValueError: the group has no ``partitions`` and does not come from ``param_groups``, or the pieces of a
                parameter are unknown.
        """
        group, structures = read_group(param_group)
        if "partitions" not in group:
            if structures is None:
                raise ValueError(
                    "AdamMini needs to know how each parameter is cut into heads and outputs, and this group has no "
                    "`partitions`: make the groups with blockwise_lr.param_groups(model, lr)"
                )
            # Lists, because torch.load with weights_only accepts them.
            group["partitions"] = [each.partition and list(each.partition) for each in structures]
        _check_partitions(group)
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: computes the loss and its gradients again. Default: none.

        Returns:
            The value of the closure, or None.

        Raises:
            RuntimeError: a gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [self._with_gradients(group) for group in self.param_groups]
        counts = [self.state[parameter]["step"] for each in found for parameter, _ in each]
        if counts:
            torch._foreach_add_(counts, 1)
        times = iter(stack_scalars(counts).tolist())  # the counts are on the CPU: no host sync
        cut: list[StepInputs] = []
        for group, each in zip(self.param_groups, found):
            inputs = self._step_inputs(group, each, [next(times) for _ in each])
            (compiled_step if group["compile"] else foreach_step)([one for one in inputs if one.whole])
            cut += [one for one in inputs if not one.whole]
        if cut:
            sharded_step(cut)
        return loss

    def _with_gradients(self, group: dict[str, Any]) -> list[tuple[Tensor, list[int]]]:
        """Return the parameters that have a gradient with their partitions, and create the state of new ones."""
        found = []
        for i, (parameter, partition) in enumerate(zip(group["params"], group["partitions"])):
            if parameter.grad is None:
                continue
            check_dense_and_real(group, i, parameter.grad, "AdamMini")
            state = self.state[parameter]
            if not state:
                wide = torch.float32 if parameter.dtype in HALF else parameter.dtype
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter, dtype=wide)
                state["exp_avg_sq"] = (
                    sharded_zeros(parameter, partition, wide)
                    if is_sharded(parameter)
                    else torch.zeros(partition, dtype=wide, device=parameter.device)
                )
            found.append((parameter, partition))
        return found

    def _step_inputs(
        self, group: dict[str, Any], found: Sequence[tuple[Tensor, list[int]]], times: Sequence[float]
    ) -> list[StepInputs]:
        """Return what the step of each parameter needs, without parameters that have no elements.

        Args:
            group: the group.
            found: its parameters that have a gradient, with their partitions.
            times: number of steps of each of them, this one included.
        """
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        return [
            StepInputs(
                parameter=parameter,
                gradient=local(sharded_like(parameter, cast("Tensor", parameter.grad))),
                first=local(self.state[parameter]["exp_avg"]),
                second=local(self.state[parameter]["exp_avg_sq"]),
                partition=tuple(partition),
                betas=(beta1, beta2),
                decay=1 - lr * group["weight_decay"],
                rate=lr / (1 - beta1**time),
                root=1 / math.sqrt(1 - beta2**time),
                eps=group["eps"],
                maximize=group["maximize"],
                whole=is_whole(parameter, partition),
            )
            for (parameter, partition), time in zip(found, times)
            if parameter.numel()
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep the moments of bf16 and fp16 parameters in float32.

        torch casts the state to the dtype of the parameters. The numbers of steps are kept on the CPU, so that no step
        waits for another device to read them.

        Raises:
            ValueError: the state was saved by another optimizer.
        """
        given = [state_dict]
        # Hooks may replace the state. A hook that is registered last sees the state that is loaded.
        last = self.register_load_state_dict_pre_hook(lambda _, state: given.append(state))
        try:
            with own_states_only(self, "partitions"):
                super().load_state_dict(state_dict)
        finally:
            last.remove()
        for state in self.state.values():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device="cpu")
        state_dict = given[-1]
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(saved, parameters):
            if parameter.dtype in HALF and key in state_dict["state"]:
                for name in ("exp_avg", "exp_avg_sq"):
                    value = state_dict["state"][key][name]
                    self.state[parameter][name] = value.detach().clone().to(parameter.device, torch.float32)


def _check(name: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name} is {value}; expected {expected}")


def _check_partitions(group: Mapping[str, Any]) -> None:
    parameters, partitions = group["params"], group["partitions"]
    if len(partitions) != len(parameters):
        raise ValueError(
            f"a group has {len(parameters)} parameters and {len(partitions)} partitions; expected one for each: make "
            "the groups with blockwise_lr.param_groups(model, lr)"
        )
    for i, (parameter, partition) in enumerate(zip(parameters, partitions)):
        name = name_in_group(group, i)
        if partition is None:
            raise ValueError(
                f"AdamMini cannot cut {name} into heads: it is a fused weight that was not split (call "
                "split_fused(model) before param_groups), or its attention does not say how many heads it has (give "
                "the module an attribute `num_heads`, and `num_key_value_heads` where they are fewer)"
            )
        fits = len(partition) == parameter.ndim and all(
            size % pieces == 0 if pieces > 0 else pieces == size == 0
            for size, pieces in zip(parameter.shape, partition)
        )
        if not fits:
            raise ValueError(
                f"{name} of shape {tuple(parameter.shape)} cannot be cut into {tuple(partition)} equal pieces: make "
                "the groups with blockwise_lr.param_groups(model, lr)"
            )
