"""The engine of a model cut into pipeline stages: DeepSpeed's PipelineEngine, ZeRO 0 and 1.

s sequence, b micro batch, v vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.param_attrs import is_tied
from megatron.engine.base import BaseEngine
from megatron.engine.engine import as_tensor
from megatron.engine.expert_gather import all_experts
from megatron.engine.grad_accumulation import accumulate
from megatron.engine.inference_forward import for_sequence_cuts, pipeline_forward
from megatron.engine.loss_normalization import loss_divisor, sum_over_data, unmasked
from megatron.engine.prompt_offset import behind, prompt_offset
from megatron.model.kv_cache import KVCache

Pair = tuple[Tensor | tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

_FULL_PIPELINE = 8
"""Micro batches a stage from which on the time in which stages wait for others is below an eighth."""


@dataclass(kw_only=True)
class PipelinedEngine(BaseEngine):
    """One pipeline stage in one PipelineEngine."""

    hidden_size: int
    padded_vocab_size: int
    dtype: torch.dtype
    pipelined: bool = True
    length: int | None = None
    """Length of the sequences of the last step [tokens]."""

    def prepare(self, micro_batches: int, length: int) -> None:
        accumulate(self.deepspeed, micro_batches)
        if length != self.length:
            self.deepspeed.reset_activation_shape()
            self.length = length

    def _run_micro_batches(self, batches: Iterator[MicroBatch]) -> Tensor:
        return as_tensor(self.deepspeed.train_batch(self._step(batches)))

    @property
    def least_evaluated(self) -> int:
        return _FULL_PIPELINE * self.topology.pipe.size

    def eval_sums(self, batches: Iterator[MicroBatch], count: int) -> tuple[float, float]:
        tokens = torch.zeros((), dtype=torch.float64, device=self.deepspeed.device)
        one = torch.ones((), device=self.deepspeed.device)

        def counted() -> Iterator[Pair]:
            for batch in islice(batches, count):
                tokens.add_(unmasked([batch]).to(tokens.device))
                yield _pair(batch, one)

        self.deepspeed.reset_activation_shape()  # training may have shorter sequences
        try:  # the mean of the sums of micro batches and ranks
            mean = self.deepspeed.eval_batch(counted(), num_micro_batches=count)
        finally:
            self.deepspeed.reset_activation_shape()
        if not self.topology.pipe.is_last:
            tokens.zero_()  # the stages between the ends read no samples; the last one speaks for all
        sum_over_data(tokens, self.topology)
        if self.topology.pipe.size > 1:
            dist.all_reduce(tokens, group=self.topology.pipe.group)
        return float(mean) * count * self.topology.data.size, float(tokens)

    @torch.no_grad()
    def logits(self, tokens: Tensor, cache: KVCache | None = None, at: Tensor | None = None) -> Tensor:
        module = self.deepspeed.module
        module.eval()
        places = prompt_offset(self.prompt, cache)
        logits = pipeline_forward(
            module.forward_funcs,
            for_sequence_cuts(behind(tokens, places), cache, self.topology),
            cache,
            self.topology,
            hidden_size=self.hidden_size,
            padded_vocab_size=self.padded_vocab_size,
            dtype=self.dtype,
        )
        logits = logits[:, places : places + tokens.shape[1]]
        return logits if at is None else logits.flatten(0, 1)[at]

    def layers(self) -> dict[int, Module]:
        """The layers of this stage, by their index in the plan; a tied output layer is no module and left out."""
        model = self.deepspeed.module
        numbered = zip(model.layer_range, model.forward_funcs, strict=True)
        return {index: layer for index, layer in numbered if isinstance(layer, Module)}

    def weights(self) -> dict[str, Tensor]:
        """Key -> this rank's shards of the layers its stage owns."""
        return {key: all_experts(parameter) for key, parameter in self.owned().items()}

    def _step(self, batches: Iterator[MicroBatch]) -> Iterator[Pair]:
        """The pairs of one step, drawn at the ends of the pipeline: the stages between need none."""
        if not (self.topology.pipe.is_first or self.topology.pipe.is_last):
            return iter(())
        step = [next(batches) for _ in range(self.deepspeed.micro_batches)]
        tokens = loss_divisor(step, self.topology, self.deepspeed.device)
        return iter([_pair(batch, tokens) for batch in step])

    def owned(self) -> dict[str, Parameter]:
        """Without the copy of a tied weight that the last stage holds: the first stage speaks for it."""
        first = self.topology.pipe.is_first
        return {key: parameter for key, parameter in self.parameters.items() if first or not is_tied(parameter)}


def _pair(batch: MicroBatch, tokens: Tensor) -> Pair:
    """A micro batch as the PipelineEngine takes it: (inputs, what the loss needs)."""
    starts = batch.document_starts
    return batch.tokens if starts is None else (batch.tokens, starts), (batch.labels, batch.loss_mask, tokens)
