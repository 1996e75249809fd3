"""Everything that decides how a model is built, in one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from megatron.config.schema.initialization import InitializationSection
from megatron.config.schema.kernels import KernelsSection
from megatron.config.schema.mixers import MixersSection
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.config.schema.mup import MupSection
from megatron.distributed.mesh import Topology
from megatron.distributed.param_init import ParamFactory, Rescale
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.kernels.dispatch import Kernels, capability_of, choose_kernels, facts_of, load_attention
from megatron.kernels.weight_gradients import WeightGradients
from megatron.model.init import rescaling
from megatron.model.loss_parts import LossParts
from megatron.model.moe.losses import RouterLossTracker
from megatron.model.scales import Scales
from megatron.param_table import ModelDims, Multipliers, MupWidths, base_widths, width_ratios
from megatron.registry import WITHOUT_ATTENTION
from megatron.registry.attention_facts import AttentionFacts


@dataclass(frozen=True)
class ModelSpec:
    """Sections of the configuration, the layout of ranks and the numbers from which `layers.py` builds a model."""

    model: ModelSection
    """Sizes and parts of the model."""
    initialization: InitializationSection
    """Initial values."""
    kernel_options: KernelsSection
    """Implementations of operations."""
    padded_vocab_size: int
    """Rows of the embedding [tokens]."""
    topology: Topology
    """Axes of this rank."""
    seed: int
    """Seed of the run."""
    dtype: torch.dtype
    """Type of the parameters."""
    vocab_size: int | None = None
    """Rows that are tokens; all unless set. The others are initialized to 0."""
    device: torch.device | None = None
    """Device of the model, for the choice of kernels; the GPU if there is one, unless set."""
    random: TensorParallelRNG | None = None
    """Generator for random numbers on sharded tensors, whose state is checkpointed; a new one unless set."""
    recompute_attention: Callable[..., Tensor] | None = None
    """Called as f(attention core, *inputs); recomputes the core in the backward pass."""
    reset_attention: bool = False
    """Tokens attend to their own document only."""
    reset_positions: bool = False
    """Positions start again with each document."""
    moe: MoeSection | None = None
    """Without it no block has experts."""
    mixers: MixersSection | None = None
    """Without it every block has attention."""
    mup: MupSection | None = None
    """Without it the model has the standard parametrization."""
    router_losses: RouterLossTracker | None = None
    """Losses of the routers, which the training engine reads; a new tracker unless set."""
    loss_parts: LossParts | None = None
    """Collects losses beside that of tokens, which the training engine reads; None for none."""
    weight_gradients: WeightGradients | None = None
    """Takes the gradients of weights that a backward pass leaves for later; None if it leaves none."""
    first_layer: int = 0
    """Index of the first layer in the model: that of the embedding of a second encoder."""

    @cached_property
    def dims(self) -> ModelDims:
        """Sizes and flags of the model."""
        return ModelDims.of(self.model, self.moe, self.mixers)

    @cached_property
    def rng(self) -> TensorParallelRNG:
        """The generator for random numbers on sharded tensors."""
        return self.random or TensorParallelRNG(self.seed, self.topology.rank, self._device)

    @cached_property
    def kernels(self) -> Kernels:
        """Kernels for the device and the type of the parameters."""
        facts = AttentionFacts.of(
            facts_of(self._device, self.dtype, self.kernel_options, self.model.activation),
            self.model,
            documents=self.reset_attention,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            capability=capability_of(self._device),
        )
        kinds = [kind for kind in self.dims.kinds if kind not in WITHOUT_ATTENTION]
        kernels = replace(
            choose_kernels(self._device, self.dtype, self.kernel_options, self.model.activation, self.weight_gradients),
            attention=load_attention(facts, kinds, self.kernel_options),
        )
        return kernels if self.recompute_attention is None else kernels.recomputed(self.recompute_attention)

    @cached_property
    def multipliers(self) -> Multipliers:
        """Factors of muP; all 1 without it."""
        return Multipliers.of(self.mup, self.dims)

    @cached_property
    def scales(self) -> Scales:
        """Factors and bounds of activations beside muP's; none by default."""
        return Scales.of(self.model, self.dims, self.dtype)

    @property
    def initial_width(self) -> int:
        """Hidden size that the initial values are computed for: that of the base model under muP."""
        return self.dims.hidden_size if self._base is None else self._base.hidden_size

    def param_factory(self, layer: int) -> ParamFactory:
        """Returns the factory of the parameters of a layer. layer: its index, counted from `first_layer`."""
        return ParamFactory(
            seed=self.seed,
            layer=self.first_layer + layer,
            axis=self.topology.model,
            dtype=self.dtype,
            rescale=self._rescale,
        )

    def behind(self, layers: int) -> ModelSpec:
        """Returns the spec of an encoder behind so many layers; both draw from the same generator."""
        return replace(self, first_layer=layers, random=self.rng)

    @cached_property
    def _base(self) -> MupWidths | None:
        return base_widths(self.mup)

    @cached_property
    def _rescale(self) -> Rescale | None:
        if self._base is None or self.mup is None:
            return None
        return rescaling(width_ratios(self.dims, self._base), self.mup.mup_init_scale)

    @cached_property
    def _device(self) -> torch.device:
        return self.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
