"""Inference engine: the layers of one pipeline stage, without DeepSpeed.

Weights are stored by name, so the stages need not be those of training: layers are distributed evenly.
s sequence, b batch, v padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import device
from megatron.distributed.tensor_parallel.embedding import VocabParallelEmbedding
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear
from megatron.distributed.tensor_parallel.lora import magnitude_arguments
from megatron.engine.drafter import Drafter
from megatron.engine.expert_bias import correction_biases
from megatron.engine.inference_forward import pipeline_forward
from megatron.engine.prompt_offset import prepend_padding, prompt_offset, shift_positions
from megatron.kernels.packed_linear import packed_linear, packing_unavailable
from megatron.model.embedding import EmbeddingLayer
from megatron.model.kv_cache import KVCache
from megatron.model.layers import LayerSpec
from megatron.model.pipeline_model import tied_output
from megatron.model.value_residual import CarryShape
from megatron.param_table import key_in_table


@dataclass(frozen=True)
class Stage:
    """The built layers of one stage."""

    indices: range
    """Their indices in the model."""
    functions: tuple[Callable[..., Tensor], ...]
    """Layers, called in order as function(carry, cache)."""
    parameters: dict[str, Parameter]
    """Key -> parameter; the copy of a tied embedding that is the output layer has the embedding's key."""
    buffers: dict[str, Tensor]
    """Key -> stored buffer: correction biases of routers."""


def build_stage(layer_specs: Sequence[LayerSpec], topology: Topology) -> Stage:
    """Builds this rank's layers, on its device and in evaluation mode."""
    pipe = topology.pipe
    indices = range(len(layer_specs) * pipe.rank // pipe.size, len(layer_specs) * (pipe.rank + 1) // pipe.size)
    functions: list[Callable[..., Tensor]] = []
    modules: dict[int, Module] = {}
    parameters: dict[str, Parameter] = {}
    buffers: dict[str, Tensor] = {}
    for index in indices:
        layer = layer_specs[index]
        if layer.tied_to is None:
            module = modules[index] = layer.build().to(device()).eval()
            functions.append(module)
            for name, parameter in module.named_parameters():
                parameters[key_in_table(index, name)] = parameter
            buffers.update({f"{index}.{name}": buffer for name, buffer in correction_biases(module).items()})
        elif layer.tied_to in indices:
            functions.append(partial(tied_output, modules[layer.tied_to]))
        else:
            copy = EmbeddingLayer(**layer_specs[layer.tied_to].arguments, as_output_copy=True).to(device()).eval()
            functions.append(partial(tied_output, copy))
            parameters.update({f"{layer.tied_to}.{name}": parameter for name, parameter in copy.named_parameters()})
    return Stage(indices, tuple(functions), parameters, buffers)


def pack(stage: Stage) -> None:
    """Packs the weights of linear layers for products with few rows, if the CPU profits.

    The plain weights are freed, except a word embedding's, which is also looked up, and those that other products read
    too; the stage's parameters can no longer be loaded.
    """
    tied = {function.args[0] for function in stage.functions if isinstance(function, partial)}
    layers = {function for function in stage.functions if isinstance(function, Module)} | tied
    for layer in layers:
        for module in layer.modules():
            embedding = isinstance(module, VocabParallelEmbedding)
            if not hasattr(module, "kernel") or (embedding and layer not in tied) or is_read_elsewhere(module):
                continue
            weight = getattr(module, "weight", None)  # a module may have a kernel but no weight
            if isinstance(weight, Parameter) and packing_unavailable(weight) is None:
                module.kernel = packed_linear(weight)
                module.weight = weight if embedding else None
    stage.parameters.clear()


def hold_magnitudes(stage: Stage) -> None:
    """Computes the factors of DoRA's rows once, from loaded weights. Collective over the tensor-parallel axis."""
    for layer in stage.functions:
        for module in layer.modules() if isinstance(layer, Module) else ():
            found = magnitude_arguments(module)
            if found is not None:
                found[0].hold(*found[1])


def is_read_elsewhere(module: Module) -> bool:
    """Returns whether more than the layer's own product reads its weight."""
    return isinstance(module, ColumnParallelLinear) and module.keeps_weight


@dataclass
class InferenceEngine:
    """Computes logits; engine.py documents the methods."""

    stage: Stage
    """Layers of this pipeline stage."""
    topology: Topology
    """Axes of this rank."""
    make_cache: Callable[[int, int], KVCache]
    """(batch, max length) -> an empty cache."""
    carry: CarryShape
    """Shapes of what stages send."""
    padded_vocab_size: int
    """Rows of the embedding."""
    dtype: torch.dtype
    """Type of the activations."""
    prompt: int = 0
    """Vectors of a soft prompt before every sequence."""
    drafter: Drafter | None = None
    """The model with its modules that predict further tokens, where these are built."""

    @torch.inference_mode()
    def logits(self, tokens: Tensor, cache: KVCache | None = None, at: Tensor | None = None) -> Tensor:
        offset = prompt_offset(self.prompt, cache)
        at = shift_positions(at, tokens.shape[1], offset)
        logits = pipeline_forward(
            self.stage.functions,
            prepend_padding(tokens, offset),
            cache,
            self.topology,
            received=partial(self.carry.into, self.stage.indices[0]),
            padded_vocab_size=self.padded_vocab_size,
            dtype=self.dtype,
            at=None if at is None else at.to(device()),
        )
        return logits[:, offset:] if at is None else logits

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        return self.make_cache(batch, max_length)
