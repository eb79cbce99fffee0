"""Muon for the matrices of a Transformer and AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

# torch.optim.Muon refuses 3-D stacks and has no second algorithm, so this class calls the function behind its step.
from torch.optim._muon import muon as torch_muon
from torch.optim.adamw import adamw as torch_adamw
from torch.optim.optimizer import Optimizer

from blockwise_lr.distributed import is_sharded
from blockwise_lr.optimizers.added_groups import check_dense_and_real, own_states_only, read_group
from blockwise_lr.optimizers.muon_rules import algorithm_of, check_outputs_are_known, divide_by_algorithm

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Muon", "algorithm_of"]

_NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, as in torch and in the original
_NS_EPS = 1e-7  # as in torch; avoids a division by zero for a zero gradient


class Muon(Optimizer):
    r"""Muon on every matrix of QK, VO and FFN, and AdamW on all other parameters, with one base learning rate.

        B <- mu B + (1 - mu) g
        W <- W - lr (0.2 sqrt(max(a, b)) NS((1 - mu) g + mu B) + decay W)                W has a outputs, b inputs

    NS is torch's Newton-Schulz orthogonalisation in bfloat16. A stack of experts (E, a, b) counts as E matrices. The
    model determines which dimension of each matrix counts the outputs. For Conv1D and for experts stored as (E, inputs,
    outputs) it is the columns. In groups from elsewhere, ``output_dims`` gives the dimension for each parameter. The
    default scaling does not depend on it. With "original", the outputs of a group with ``algorithm`` and without
    ``output_dims`` are its rows. A group with ``block`` and without ``output_dims`` is then refused, unless its
    matrices are square.

    AdamW updates embeddings, heads, norms, biases, routers and convolutions. It also updates matrices with a side below
    `min_side`, whose spectrum is too small to equalise. :meth:`reasons` lists the algorithm of each parameter. A matrix
    that a model fuses within one block, such as gate and up projection, is orthogonalised as one matrix.

    Every group is divided into one with ``"algorithm": "muon"`` and one with ``"adamw"``. Both keep the other keys of
    the group (``block``, ``lr``, ``lr_ratio``, ``initial_lr``, ``decay``), and ``names`` is divided like ``params``.
    Schedules, clipping and checkpoints therefore see one optimizer with more groups.

    Under FSDP2 each matrix is gathered, updated as a whole on every process, and sharded again. This is correct but
    slow.

    Args:
        params: groups of :func:`blockwise_lr.param_groups`, or groups from elsewhere with the key ``algorithm``.
        lr: learning rate of groups without their own. Default 1e-3.
        betas, eps: settings of AdamW. Default (0.9, 0.95) and 1e-8.
        weight_decay: decoupled weight decay of groups without their own, for both algorithms. Default 0.1.
        momentum: mu, with Nesterov momentum. Default 0.95.
        ns_steps: number of Newton-Schulz iterations. Default 5.
        adjust_lr_fn: scale of Muon's update. "match_rms_adamw" (default) multiplies it by ``0.2 sqrt(max(a, b))``, so
            its root mean square is 0.2 for any shape, which is close to that of AdamW. One base learning rate and
            weight decay then serve both algorithms. "original" multiplies it by ``sqrt(max(1, a / b))``; the matrices
            then need a learning rate of their own.
        min_side: matrices with a smaller side are updated by AdamW. Default 8.

    Raises:
        ValueError: a group has neither block nor algorithm, a fused QKV weight is not split, or an option is out of
            range.

    References:
        Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the scaling: Moonlight, arXiv 2502.16982.

    Example:
        >>> stack = torch.nn.Parameter(torch.zeros(2, 8, 16))
        >>> optimizer = Muon([{"params": [stack], "names": ["experts"], "block": "ffn", "lr": 1e-3}])
        >>> optimizer.reasons()
        {'experts': 'muon: a stack of 2 matrices of ffn'}
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        min_side: int = 8,
    ) -> None:
        for name, share in {"betas[0]": betas[0], "betas[1]": betas[1], "momentum": momentum}.items():
            if not 0 <= share < 1:
                raise ValueError(f"{name} is {share}; expected 0 or more and below 1")
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if not value >= 0:
                raise ValueError(f"{name} is {value}; expected 0 or more")
        if adjust_lr_fn not in ("match_rms_adamw", "original"):
            raise ValueError(f'adjust_lr_fn is {adjust_lr_fn!r}; expected "match_rms_adamw" or "original"')
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "min_side": min_side,
            "fused": True,  # load_state_dict decides by this key on which device AdamW's `step` is
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of :func:`blockwise_lr.param_groups`, divided by algorithm.

        A group that has ``algorithm`` is added unchanged.

        Raises:
            ValueError: the group has neither block nor algorithm, or contains a fused QKV weight; or its parameters
                did not come from ``param_groups``, and "original" scaling needs to know which dimension counts the
                outputs.
        """
        group, structures = read_group(param_group)
        if structures is not None:
            group.setdefault("output_dims", [each.output_dim for each in structures])
        for part in divide_by_algorithm(group, group.get("min_side", self.defaults["min_side"])):
            scale = part.get("adjust_lr_fn", self.defaults["adjust_lr_fn"])
            if part["algorithm"] == "muon" and scale == "original":
                check_outputs_are_known(part)
            super().add_param_group(part)

    def reasons(self) -> dict[str, str]:
        """Return the algorithm of each parameter and its reason, by name, for groups with ``block`` and ``names``."""
        return {
            name: ": ".join(algorithm_of(group["block"], p.shape, min_side=group["min_side"]))
            for group in self.param_groups
            if "block" in group
            for name, p in zip(group.get("names", ()), group["params"])
        }

    # torch.compile confuses the state of parameters here (torch 2.13): it stepped some twice and others not at all.
    # torch.compiler.disable would import dynamo with this module.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients again. Default: none.

        Returns:
            The value of the closure, or None.

        Raises:
            RuntimeError: a gradient is sparse, or a parameter is complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for i, p in enumerate(group["params"]):
                if p.grad is not None:
                    check_dense_and_real(group, i, p.grad, "Muon")
            if group["algorithm"] == "muon":
                # The default scaling is symmetric in the two sides. Without a transpose its rounding stays as it was.
                known = "output_dims" in group and group["adjust_lr_fn"] == "original"
                outputs = group["output_dims"] if known else [-2] * len(group["params"])
                by_columns = {p for p, dim in zip(group["params"], outputs) if dim % p.ndim == p.ndim - 1}
                self._step_muon(group, parameters, by_columns)
            else:
                self._step_adamw(group, parameters)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep ``output_dims`` of this model, which older state dicts lack.

        Raises:
            ValueError: the state was saved by another optimizer.
        """
        kept = [group.get("output_dims") for group in self.param_groups]
        with own_states_only(self, "algorithm"):
            super().load_state_dict(state_dict)
        for group, outputs in zip(self.param_groups, kept):
            if outputs is not None:
                group["output_dims"] = outputs

    def _step_muon(
        self, group: dict[str, Any], parameters: Sequence[Tensor], by_columns: Collection[Tensor]
    ) -> None:
        for p in parameters:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            assert p.grad is not None
            sharded: tuple[Tensor, ...] = (p.detach(), p.grad, state["momentum_buffer"])
            whole = [cast("DTensor", t).full_tensor() if is_sharded(t) else t for t in sharded]
            torch_muon(
                *(list(_matrices(tensor, transposed=p in by_columns)) for tensor in whole),
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                nesterov=True,
                ns_coefficients=_NS_COEFFICIENTS,
                ns_steps=group["ns_steps"],
                eps=_NS_EPS,
                adjust_lr_fn=group["adjust_lr_fn"],
                has_complex=False,
            )
            if is_sharded(p):
                _copy_to_shard(cast("DTensor", p), whole[0])
                _copy_to_shard(state["momentum_buffer"], whole[2])

    def _step_adamw(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }
        if parameters:
            states = [self.state[p] for p in parameters]
            torch_adamw(
                list(parameters),
                [p.grad for p in parameters if p.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=group["fused"],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def _matrices(tensor: Tensor, *, transposed: bool) -> Sequence[Tensor]:
    """Return the matrix, or the matrices of a stack, with shape (outputs, inputs).

    These are views of `tensor`, so an update in place changes `tensor`.
    """
    tensor = tensor.mT if transposed else tensor
    return (tensor,) if tensor.ndim == 2 else tensor.unbind(0)


def _copy_to_shard(sharded: DTensor, whole: Tensor) -> None:
    """Copy this process's shard of `whole`, which every process has, into `sharded`."""
    from torch.distributed.tensor import DTensor, Replicate  # takes a second to import, and is loaded by now

    mesh = sharded.device_mesh
    cut = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    sharded.to_local().copy_(cut.redistribute(placements=sharded.placements).to_local())
