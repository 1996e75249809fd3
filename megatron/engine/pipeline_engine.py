"""Training engine with pipeline stages: DeepSpeed's PipelineEngine, ZeRO 0 and 1.

Sends and receives between stages are DeepSpeed's. s sequence, b micro batch, v vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.context_parallel.sequence_shards import SequenceShards
from megatron.distributed.param_attrs import is_tied
from megatron.engine.accumulation_steps import set_grad_accumulation
from megatron.engine.base import BaseEngine
from megatron.engine.engine import as_tensor
from megatron.engine.expert_gather import gather_experts
from megatron.engine.frozen_base import expanded
from megatron.engine.inference_forward import gather_context, pipeline_forward, shard_prompt
from megatron.engine.loss_normalization import count_loss_tokens, loss_divisor, sum_over_data
from megatron.engine.prompt_offset import prepend_padding, prompt_offset
from megatron.model.kv_cache import KVCache
from megatron.model.value_residual import CarryShape

Pair = tuple[Tensor | tuple[Tensor, ...], tuple[Tensor, ...]]

_FULL_PIPELINE = 8
"""Micro batches a stage above which less than an eighth of the time is a pipeline bubble."""


@dataclass(kw_only=True)
class PipelinedEngine(BaseEngine):
    """One pipeline stage in one PipelineEngine."""

    carry: CarryShape
    """Shapes of what stages send."""
    padded_vocab_size: int
    """Rows of the embedding."""
    dtype: torch.dtype
    """Type of the activations that are sent between stages."""
    pipelined: bool = True
    """True: the model is distributed over pipeline stages."""
    length: int | None = None
    """Length of the sequences of the last step [tokens]."""

    def prepare(self, micro_batches: int, length: int) -> None:
        set_grad_accumulation(self.deepspeed, micro_batches)
        if length != self.length:
            self.deepspeed.reset_activation_shape()
            self.length = length

    def _run_micro_batches(self, batches: Iterator[MicroBatch]) -> Tensor:
        self._watch_outliers()
        return as_tensor(self.deepspeed.train_batch(self._step(batches)))

    def _watch_outliers(self) -> None:
        """Has the last stage leave out the step where its loss is an outlier."""
        if self.outliers is not None:
            count = self.deepspeed.micro_batches
            self.outliers.begin(count, lambda total: self._mean_of_replicas(total / count))
            self.deepspeed.module.after_loss = self.outliers

    def _mean_of_replicas(self, value: Tensor) -> Tensor:
        axis = self.topology.dp_cp
        if axis.size > 1:
            dist.all_reduce(value, group=axis.group)
        return value / axis.size

    @property
    def min_eval_batches(self) -> int:
        return _FULL_PIPELINE * self.topology.pipe.size

    def eval_sums(self, batches: Iterator[MicroBatch], count: int) -> tuple[float, float]:
        tokens = torch.zeros((), dtype=torch.float64, device=self.deepspeed.device)
        one = torch.ones((), device=self.deepspeed.device)

        def with_token_count() -> Iterator[Pair]:
            for batch in islice(batches, count):
                tokens.add_(count_loss_tokens([batch]).to(tokens.device))
                yield self._pair(batch, one)

        self.deepspeed.reset_activation_shape()  # training may have shorter sequences
        try:  # the mean of the sums of micro batches and ranks
            mean = self.deepspeed.eval_batch(with_token_count(), num_micro_batches=count)
        finally:
            self.deepspeed.reset_activation_shape()
        if not self.topology.pipe.is_last:
            tokens.zero_()  # the middle stages read no samples; the last stage counts
        sum_over_data(tokens, self.topology)
        if self.topology.pipe.size > 1:
            dist.all_reduce(tokens, group=self.topology.pipe.group)
        return float(mean) * count * self.topology.dp_cp.size, float(tokens)

    @torch.no_grad()
    def logits(self, tokens: Tensor, cache: KVCache | None = None, at: Tensor | None = None) -> Tensor:
        self.deepspeed.module.eval()
        offset = prompt_offset(self.prompt, cache)
        logits = self._logits_of(shard_prompt(prepend_padding(tokens, offset), cache, self.topology), cache)
        logits = gather_context(logits, self.topology)[:, offset : offset + tokens.shape[1]]
        return logits if at is None else logits.flatten(0, 1)[at]

    def _logits_of(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        """Runs all stages over this rank's shard of the tokens [b, s/c]; returns the logits [b, s/c, v]."""
        return pipeline_forward(
            self.deepspeed.module.forward_funcs,
            tokens,
            cache,
            self.topology,
            received=partial(self.carry.into, self.deepspeed.module.layer_range[0]),
            padded_vocab_size=self.padded_vocab_size,
            dtype=self.dtype,
        )

    def layers(self) -> dict[int, Module]:
        """Returns the layers of this stage by their index in the model, without a tied output layer."""
        model = self.deepspeed.module
        numbered = zip(model.layer_range, model.forward_funcs, strict=True)
        return {index: layer for index, layer in numbered if isinstance(layer, Module)}

    def weights(self) -> dict[str, Tensor]:
        """Returns key -> this rank's shards of the layers that its stage owns."""
        own = {key: gather_experts(parameter) for key, parameter in self.owned().items()}
        return own | expanded(self.stored_base, is_saved=self.topology.dp_cp.is_first) | self.biases

    def _step(self, batches: Iterator[MicroBatch]) -> Iterator[Pair]:
        """Returns the pairs of one step on the first and last stage; the stages between need none."""
        if not (self.topology.pipe.is_first or self.topology.pipe.is_last):
            return iter(())
        step = [next(batches).to(self.deepspeed.device, non_blocking=True) for _ in range(self.deepspeed.micro_batches)]
        tokens, self.learns = loss_divisor(step, self.topology, self.deepspeed.device)
        return iter([self._pair(batch, tokens) for batch in step])

    def _pair(self, batch: MicroBatch, divisor: Tensor) -> Pair:
        pair = _pair(batch, divisor, self._shards)
        if not self.deepspeed.module.behind:
            return pair
        inputs, given = pair
        return (*((inputs,) if isinstance(inputs, Tensor) else inputs), given[0]), given  # labels go to the last stage

    @property
    def _shards(self) -> SequenceShards:
        return SequenceShards.of(self.topology)

    def owned(self) -> dict[str, Parameter]:
        """Returns key -> parameter, without the last stage's copy of a tied weight, which the first stage counts."""
        first = self.topology.pipe.is_first
        return {key: parameter for key, parameter in self.parameters.items() if first or not is_tied(parameter)}


def _pair(batch: MicroBatch, divisor: Tensor, shards: SequenceShards) -> Pair:
    """Returns this rank's shard of a micro batch in PipelineEngine's form: (inputs, arguments of the loss).

    Padding travels behind the starts of documents, which are those of full sequences; where documents are not kept
    apart, no layer reads the starts.
    """
    starts, padding = batch.document_starts, batch.padding
    beside: tuple[Tensor, ...]
    if padding is not None:
        beside = (torch.zeros_like(batch.tokens) if starts is None else starts, shards.shard(padding))
    else:
        beside = () if starts is None else (starts,)
    tokens = shards.shard(batch.inputs)
    given = (shards.shard(batch.labels), shards.shard(batch.loss_mask), divisor, *batch.order)
    return (tokens, *beside) if beside else tokens, given
