"""The choices and numbers that all blocks of a model share, resolved once from the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron.distributed.context_parallel.sequence_shards import SequenceShards
from megatron.distributed.context_parallel.states import StatePassing
from megatron.distributed.mesh import Axis
from megatron.distributed.param_init import InitFn, ParamFactory
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.distributed.tensor_parallel.lora import LoraSpec
from megatron.kernels.attention_patterns import MaskPattern
from megatron.kernels.dispatch import Kernels
from megatron.model.positions.base import AttentionPositions
from megatron.model.scales import Scales
from megatron.param_table import ModelDims, Multipliers


@dataclass(frozen=True)
class BlockSpec:
    """The choices and numbers that blocks share."""

    dims: ModelDims
    """Sizes of the model."""
    norm: Callable[[], nn.Module]
    """Builds a norm of the hidden size."""
    norm_of: Callable[[int], nn.Module]
    """Builds a norm of any width, for full sequences."""
    norm_of_shard: Callable[[int], nn.Module]
    """Builds a norm of any width, for sequences as the residual stream has them."""
    positions: tuple[AttentionPositions | None, ...]
    """For each block, what applies positions to queries and keys, or None."""
    activation: Callable[[Tensor], Tensor]
    """Activation of MLPs and experts."""
    learned: Callable[[ParamFactory], nn.Module] | None
    """Builds the activation of one MLP, where it learns; None for one that does not."""
    attention: tuple[Callable[..., nn.Module], ...]
    """Class of the attention or mixer of each block."""
    mlp: tuple[Callable[..., nn.Module], ...]
    """Class of the MLP of each block."""
    patterns: tuple[Callable[[range], MaskPattern | None], ...]
    """For each block, heads -> the mask pattern besides the causal mask, or None."""
    relative_positions: nn.Module | None
    """Module (distances, device) -> [n/t, distances], added to scores and shared by all blocks, or None."""
    head_norm: Callable[[int], nn.Module] | None
    """Builds a norm of queries or keys, by the heads of all ranks, or None."""
    init_fn: InitFn
    """Initial values of matrices."""
    output_init_fn: InitFn
    """Initial values of matrices whose output is added to the residual stream."""
    kernels: Kernels
    """Implementations of operations."""
    hidden_dropout: float = 0.0
    """[probability]."""
    attention_dropout: float = 0.0
    """[probability]."""
    random: TensorParallelRNG = field(default_factory=lambda: TensorParallelRNG(0, 0))
    """Generator for random numbers on sharded tensors."""
    dtype: torch.dtype = torch.float32
    """Type of the parameters."""
    reset_attention: bool = False
    """Tokens attend to their own document only."""
    reset_positions: bool = False
    """Positions start again with each document."""
    encoder_length: int = 0
    """Tokens of the encoder in a sequence of an encoder-decoder; 0 for a model of one stack."""
    encoder_rows: int = 0
    """Those of them whose residual stream this rank has, fewer with sequence parallelism."""
    shards: SequenceShards = field(default_factory=SequenceShards)
    """Which positions of a sequence each of the ranks has that share it."""
    states: StatePassing = field(default_factory=lambda: StatePassing(Axis("context")))
    """Passes the states of blocks that process a sequence in order from rank to rank."""
    key_head: Axis = field(default_factory=lambda: Axis("key_head"))
    """Tensor-parallel ranks that share a key head."""
    moe_config: Any = None
    """The `MoEConfig` of blocks with experts, if there are any."""
    multipliers: Multipliers = field(default_factory=Multipliers)
    """Factors of muP."""
    scales: Scales = field(default_factory=Scales)
    """Factors and bounds of activations."""
    lora_specs: Mapping[str, LoraSpec] = field(default_factory=dict)
    """Target of `lora` -> adapter of such matrices."""
