"""What every block of one model is made of, decided once from the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron.distributed.mesh import Axis
from megatron.distributed.param_init import InitFn
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.distributed.tensor_parallel.lora import LoraSpec
from megatron.kernels.attention_mask import MaskPattern
from megatron.kernels.dispatch import Kernels
from megatron.model.positions.base import AttentionPositions
from megatron.param_table import ModelDims, Multipliers


@dataclass(frozen=True)
class BlockSpec:
    """The choices and numbers that blocks share.

    norm: makes a norm of the hidden size. norm_of: makes one of any width, for whole sequences. positions: turns
    queries and keys, or None. activation: of the MLP. attention, mlp: the class of each block. patterns: for each
    block, numbers of heads -> what it hides from them besides what is later. relative: positions that are added to
    scores, a module (distances, device) -> [n/t, distances] that all blocks share, or None. head_norm: makes a norm
    of queries or keys, or None. fill and output_fill: initial values of matrices, and of those that add to the
    residual. Dropout is a probability. random: the generator for draws on tensors cut over ranks. context: the ranks
    that share a sequence. reset_attention, reset_positions: at each document of a sequence. mixture: the `MoEConfig` of
    blocks with experts, in a model that has any. multipliers: the factors of muP. updates: target of `lora` -> the
    low-rank update of such matrices.
    """

    dims: ModelDims
    norm: Callable[[], nn.Module]
    norm_of: Callable[[int], nn.Module]
    positions: AttentionPositions | None
    activation: Callable[[Tensor], Tensor]
    attention: tuple[Callable[..., nn.Module], ...]
    mlp: tuple[Callable[..., nn.Module], ...]
    patterns: tuple[Callable[[range], MaskPattern | None], ...]
    relative_positions: nn.Module | None
    head_norm: Callable[[], nn.Module] | None
    init_fn: InitFn
    output_init_fn: InitFn
    kernels: Kernels
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    random: TensorParallelRNG = field(default_factory=lambda: TensorParallelRNG(0, 0))
    dtype: torch.dtype = torch.float32
    reset_attention: bool = False
    reset_positions: bool = False
    context: Axis = field(default_factory=lambda: Axis("context"))
    moe_config: Any = None
    multipliers: Multipliers = field(default_factory=Multipliers)
    lora_specs: Mapping[str, LoraSpec] = field(default_factory=dict)
