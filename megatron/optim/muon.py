"""Muon (K. Jordan 2024; arXiv:2502.16982) for the matrices inside the blocks, AdamW for everything else.

The momentum of a matrix is orthogonalized by torch in five Newton-Schulz iterations, which need the full matrix.
Embeddings, the output layer and vectors take AdamW at the same learning rate: by default Muon's step is scaled by
0.2 sqrt(max(rows, columns)), which gives it the size of an AdamW step (arXiv:2502.16982, equation 4). A stacked weight,
such as queries, keys and values, is one matrix here.

In bfloat16 DeepSpeed keeps fp32 copies as flat partitions; its own Muon reassembles matrices from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter

from megatron.distributed.param_attrs import is_embedding_like, no_weight_decay
from megatron.optim.adam import BETAS, EPS
from megatron.optim.builder_args import Groups, OptimizerArgs, mark_int_step
from megatron.optim.unsharded import UnshardedOptimizer


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
    muon = partial(
        torch.optim.Muon,
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


def needs_default_mpu(optimizer: torch.optim.Optimizer) -> bool:
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
