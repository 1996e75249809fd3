"""Muon (K. Jordan 2024; arXiv:2502.16982) for the matrices inside the blocks, AdamW for everything else.

The momentum of a matrix is orthogonalized in Newton-Schulz iterations, which need the full matrix: by torch's Muon, by
the kernel that the table of kernels names, or by iterations of our own on a CPU.
Embeddings, the output layer and vectors take AdamW at the same learning rate: by default Muon's step is scaled by
0.2 sqrt(max(rows, columns)), which gives it the size of an AdamW step (arXiv:2502.16982, equation 4). A stacked weight,
such as queries, keys and values, is one matrix unless an option says otherwise.

In bfloat16 each matrix has one fp32 copy, on the rank that updates it (`master_muon.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter

from megatron.distributed.param_attrs import expert_count, head_layout, is_embedding_like, no_weight_decay
from megatron.kernels.cpu_newton_schulz import cpu_iterations
from megatron.kernels.newton_schulz import STANDARD, orthogonalize
from megatron.optim.adam import BETAS, EPS
from megatron.optim.builder_args import Groups, OptimizerArgs
from megatron.optim.master_muon import MasterMuon
from megatron.optim.muon_step import MuonOptions, PieceMuon
from megatron.optim.qk_clip import QKClip
from megatron.optim.unsharded import OptimizerFactory, UnshardedOptimizer

ROW_BETA = 0.95
"""Decay rate of NorMuon's second moments unless `normuon_beta2` is set."""


def build(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds Muon and torch.optim.AdamW as one optimizer, over fp32 copies of the matrices where ZeRO is used."""
    matrices, other_groups = [], []
    for group in groups:
        inside = [parameter for parameter in group["params"] if is_muon_matrix(parameter)]
        rest = [parameter for parameter in group["params"] if not is_muon_matrix(parameter)]
        matrices += _of(group, inside)
        other_groups += _of(group, rest)
    muon = _muon(matrices, args)
    adam = partial(
        torch.optim.AdamW,
        lr=args.lr,
        betas=args.betas(BETAS),
        eps=args.number("eps", EPS),
        fused=True,
    )
    optimizer: MasterMuon | UnshardedOptimizer
    if args.flat_partitions:
        optimizer = MasterMuon(matrices, other_groups, muon, adam, args.topology)
    else:
        axis = args.topology.model
        optimizer = UnshardedOptimizer(matrices, muon, axis, other_groups=other_groups, other_factory=adam)
    if "qk_clip_threshold" in args.settings:
        listed = [parameter for group in matrices for parameter in group["params"]]
        optimizer.clip = QKClip(listed, args.topology, args.number("qk_clip_threshold", 0.0))
    return optimizer


def _muon(matrices: Groups, args: OptimizerArgs) -> OptimizerFactory:
    """Returns what builds torch's Muon, or one with the same state where a kernel, an option or the CPU asks for it."""
    parameters = [parameter for group in matrices for parameter in group["params"]]
    options = options_of(args, parameters)
    iterations = None if args.kernel is None else args.kernel.compute
    if iterations is None and parameters:
        iterations = cpu_iterations(parameters[0].device)
    is_torch_s = iterations is None and options.are_default
    return partial(
        torch.optim.Muon if is_torch_s else partial(PieceMuon, iterations or orthogonalize, options),
        lr=args.lr,
        momentum=args.number("momentum", 0.95),
        nesterov=args.flag("nesterov", True),
        ns_steps=int(args.number("ns_steps", 5)),
        adjust_lr_fn=args.settings.get("adjust_lr_fn", "match_rms_adamw"),
    )


def options_of(args: OptimizerArgs, parameters: Iterable[Parameter]) -> MuonOptions:
    """Returns the options of the step; those that concern no parameter stay off, so that torch's own step can serve."""
    found = list(parameters)
    attends = any(head_layout(parameter) is not None for parameter in found)
    stacks = any(expert_count(parameter) > 1 for parameter in found)
    return MuonOptions(
        split_experts=stacks and args.flag("split_experts", False),
        split_qkv=attends and args.flag("split_qkv", False),
        split_heads=attends and args.flag("split_heads", False),
        ns_coefficients=args.settings.get("ns_coefficients", STANDARD),
        row_beta=args.number("normuon_beta2", ROW_BETA) if args.flag("normuon", False) else None,
        momentum_dtype=torch.bfloat16 if args.settings.get("momentum_dtype") == "bfloat16" else torch.float32,
    )


def is_muon_matrix(parameter: Parameter) -> bool:
    """Returns whether Muon takes the parameter: a matrix that maps hidden features to hidden features.

    A parameter without weight decay maps nothing, even with two dimensions (the states of Mamba).
    """
    return parameter.dim() == 2 and not is_embedding_like(parameter) and not no_weight_decay(parameter)


def _of(group: dict[str, Any], parameters: Iterable[Parameter]) -> Groups:
    listed = list(parameters)
    return [{**group, "params": listed}] if listed else []
