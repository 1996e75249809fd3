"""Muon (K. Jordan 2024; arXiv:2502.16982) for the matrices inside the blocks, AdamW for everything else.

The momentum of a matrix is orthogonalised by five Newton-Schulz iterations, which need the matrix whole; torch ships
it. Tables that are looked up a row at a time, the output layer and vectors take AdamW at the same rate: by default
Muon's step is scaled by 0.2 sqrt(max(rows, columns)), which gives it the size of an AdamW step (arXiv:2502.16982,
equation 4). A stacked weight, such as queries, keys and values, is one matrix here.

In bfloat16 DeepSpeed keeps fp32 copies as flat pieces; its own Muon knows how to put matrices together from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter

from megatron.distributed.param_attrs import is_embedding_like, no_weight_decay
from megatron.optim.adam import BETAS, EPS
from megatron.optim.builder_args import Groups, Request, count_in_integers
from megatron.optim.unsharded import UnshardedOptimizer


def build(groups: Groups, request: Request) -> torch.optim.Optimizer:
    """torch.optim.Muon and torch.optim.AdamW as one optimizer; DeepSpeed's where ZeRO makes pieces."""
    matrices, others = [], []
    for group in groups:
        inside = [parameter for parameter in group["params"] if is_hidden_matrix(parameter)]
        rest = [parameter for parameter in group["params"] if not is_hidden_matrix(parameter)]
        matrices += _of(group, inside)
        others += _of(group, rest)
    if request.pieces:
        return _of_deepspeed(matrices, others, request)
    muon = partial(
        torch.optim.Muon,
        lr=request.lr,
        momentum=request.number("momentum", 0.95),
        nesterov=request.flag("nesterov", True),
        ns_steps=int(request.number("ns_steps", 5)),
        adjust_lr_fn=request.settings.get("adjust_lr_fn", "match_rms_adamw"),
    )
    adam = partial(
        torch.optim.AdamW,
        lr=request.lr,
        betas=request.betas(BETAS),
        eps=request.number("eps", EPS),
        fused=True,
    )
    return UnshardedOptimizer(matrices, muon, request.topology.model, others=others, make_others=adam)


def _of_deepspeed(matrices: Groups, others: Groups, request: Request) -> torch.optim.Optimizer:
    """DeepSpeed's Muon, which puts matrices together again from the pieces that ZeRO 1 makes of bfloat16 weights.

    Its step is that of adjust_lr_fn: original.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in matrices:
        momentum = request.number("momentum", 0.95)
        group.update(use_muon=True, lr=request.lr, momentum=momentum, ns_method="standard")
    for group in others:
        betas, eps = request.betas(BETAS), request.number("eps", EPS)
        group.update(use_muon=False, lr=request.lr, betas=betas, eps=eps)
    for group in (*matrices, *others):
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    optimizer = MuonWithAuxAdam([*matrices, *others])
    optimizer.neox_finds_groups = True
    return count_in_integers(optimizer)


def finds_groups(optimizer: torch.optim.Optimizer) -> bool:
    """Whether DeepSpeed must find the data-parallel ranks itself: its Muon takes no other answer than all of them."""
    return getattr(optimizer, "neox_finds_groups", False)


def is_hidden_matrix(parameter: Parameter) -> bool:
    """Whether Muon takes the parameter: a matrix that maps hidden features to hidden features.

    What weight decay leaves alone maps nothing, even where it has two dimensions (the states of Mamba).
    """
    return parameter.dim() == 2 and not is_embedding_like(parameter) and not no_weight_decay(parameter)


def _of(group: dict[str, Any], parameters: Iterable[Parameter]) -> Groups:
    listed = list(parameters)
    return [{**group, "params": listed}] if listed else []
