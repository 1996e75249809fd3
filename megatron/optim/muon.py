"""Muon (K. Jordan 2024; arXiv:2502.16982) for the matrices inside the blocks, AdamW for everything else.

The momentum of a matrix is orthogonalized in five Newton-Schulz iterations, which need the full matrix: by the library
whose Muon runs, or by the kernel that the table of kernels names.
Embeddings, the output layer and vectors take AdamW at the same learning rate: by default Muon's step is scaled by
0.2 sqrt(max(rows, columns)), which gives it the size of an AdamW step (arXiv:2502.16982, equation 4). A stacked weight,
such as queries, keys and values, is one matrix here.

In bfloat16 DeepSpeed keeps fp32 copies as flat partitions; its own Muon reassembles matrices from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron.distributed.param_attrs import is_embedding_like, no_weight_decay
from megatron.kernels.newton_schulz import Iterations
from megatron.optim.adam import BETAS, EPS
from megatron.optim.builder_args import Groups, OptimizerArgs, mark_int_step
from megatron.optim.unsharded import UnshardedOptimizer

MOMENTUM = "momentum_buffer"


def build(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds torch.optim.Muon and torch.optim.AdamW as one optimizer, or DeepSpeed's if ZeRO makes flat partitions."""
    matrices, other_groups = [], []
    for group in groups:
        inside = [parameter for parameter in group["params"] if is_muon_matrix(parameter)]
        rest = [parameter for parameter in group["params"] if not is_muon_matrix(parameter)]
        matrices += _of(group, inside)
        other_groups += _of(group, rest)
    if args.flat_partitions:
        return _of_deepspeed(matrices, other_groups, args)
    iterations = iterations_of(args.kernel)
    muon = partial(
        torch.optim.Muon if iterations is None else partial(KernelMuon, iterations),
        lr=args.lr,
        momentum=args.number("momentum", 0.95),
        nesterov=args.flag("nesterov", True),
        ns_steps=int(args.number("ns_steps", 5)),
        adjust_lr_fn=args.settings.get("adjust_lr_fn", "match_rms_adamw"),
    )
    adam = partial(
        torch.optim.AdamW,
        lr=args.lr,
        betas=args.betas(BETAS),
        eps=args.number("eps", EPS),
        fused=True,
    )
    return UnshardedOptimizer(matrices, muon, args.topology.model, other_groups=other_groups, other_factory=adam)


def _of_deepspeed(matrices: Groups, other_groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds DeepSpeed's Muon, which reassembles matrices from ZeRO 1's partitions of bfloat16 weights.

    Its step is that of adjust_lr_fn: original.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in matrices:
        momentum = args.number("momentum", 0.95)
        group.update(use_muon=True, lr=args.lr, momentum=momentum, ns_method="standard")
    for group in other_groups:
        betas, eps = args.betas(BETAS), args.number("eps", EPS)
        group.update(use_muon=False, lr=args.lr, betas=betas, eps=eps)
    for group in (*matrices, *other_groups):
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    optimizer = MuonWithAuxAdam([*matrices, *other_groups])
    optimizer.neox_finds_groups = True
    return mark_int_step(optimizer)


class KernelMuon(torch.optim.Muon):
    """torch's Muon, whose iterations are those of a kernel. Its state is the same."""

    def __init__(self, iterations: Iterations, groups: Groups, **settings: Any) -> None:
        """Creates the optimizer.

        Args:
            iterations: Newton-Schulz iterations.
            groups: Parameter groups of matrices.
            settings: Arguments of torch.optim.Muon.
        """
        super().__init__(groups, **settings)
        self._iterations = iterations

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Updates the matrices that have gradients."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(gradient)
        momentum = state[MOMENTUM].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = self._iterations(update, group["ns_steps"])
        rows, columns = parameter.shape
        matched = group["adjust_lr_fn"] == "match_rms_adamw"
        scale = 0.2 * max(rows, columns) ** 0.5 if matched else max(1.0, rows / columns) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * scale)


def iterations_of(kernel: Any) -> Iterations | None:
    """Returns the iterations of the table's choice; None where the library's own serve."""
    return None if kernel is None else kernel.compute


def use_kernel(optimizer: Any, kernel: Any) -> None:
    """Has the step of DeepSpeed's optimizer orthogonalize by the table's choice, if it wraps DeepSpeed's Muon.

    DeepSpeed looks its function up by name in its module, where the kernel stands during a step.

    Args:
        optimizer: DeepSpeed's optimizer, which ZeRO needs.
        kernel: The table's choice for the run's optimizer, or None.
    """
    if not needs_default_mpu(getattr(optimizer, "optimizer", None)):
        return
    iterations = iterations_of(kernel)
    if iterations is None:
        return
    own_step, eager = optimizer.step, torch.compiler.disable(iterations)  # DeepSpeed compiles what is around them

    def step(*args: Any, **keywords: Any) -> Any:
        with _in_deepspeed(eager):
            return own_step(*args, **keywords)

    optimizer.step = step


@contextmanager
def _in_deepspeed(iterations: Iterations) -> Iterator[None]:
    from deepspeed.runtime.zero.muon import original_muon

    name = "zeropower_via_newtonschulz5"
    own = getattr(original_muon, name)
    try:
        setattr(original_muon, name, iterations)
        yield
    finally:
        setattr(original_muon, name, own)


def needs_default_mpu(optimizer: torch.optim.Optimizer | None) -> bool:
    """Returns whether DeepSpeed must find the data-parallel ranks itself: its Muon requires all ranks."""
    return getattr(optimizer, "neox_finds_groups", False)


def is_muon_matrix(parameter: Parameter) -> bool:
    """Returns whether Muon takes the parameter: a matrix that maps hidden features to hidden features.

    A parameter without weight decay maps nothing, even with two dimensions (the states of Mamba).
    """
    return parameter.dim() == 2 and not is_embedding_like(parameter) and not no_weight_decay(parameter)


def _of(group: dict[str, Any], parameters: Iterable[Parameter]) -> Groups:
    listed = list(parameters)
    return [{**group, "params": listed}] if listed else []
