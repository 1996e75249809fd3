"""Training engine with several pipeline stages on a rank, ZeRO 0 and 1.

The passes run in the order of a schedule (pipe_schedule/order.py). Everything after the last backward pass (gradients
of tied weights, their reduction over data-parallel ranks, the optimizer) is DeepSpeed's PipelineEngine, as with one
stage a rank. s sequence, b micro batch, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.torch_autocast import autocast_if_enabled
from torch import Tensor

from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.mesh import Axis
from megatron.engine.accumulation_steps import set_grad_accumulation
from megatron.engine.chunk_forward import chunk_logits
from megatron.engine.loss_normalization import count_loss_tokens, loss_divisor
from megatron.engine.pipe_runner import PipeRunner
from megatron.engine.pipe_stage import Backward, ChunkStage
from megatron.engine.pipeline_engine import PipelinedEngine
from megatron.kernels.weight_gradients import WeightGradients
from megatron.model.kv_cache import KVCache
from megatron.pipe_schedule.layout import PipeLayout

Facts = tuple[int, int, bool, bool]
"""b and s of every micro batch, and whether there are starts of documents and a mask of padding."""


@dataclass(kw_only=True)
class ScheduledEngine(PipelinedEngine):
    """Several pipeline stages in one PipelineEngine."""

    layout: PipeLayout
    """The schedule."""
    weight_gradients: WeightGradients | None = None
    """Takes the gradients of weights that the schedule computes later; None if it leaves none."""
    stages: list[ChunkStage] = field(init=False)
    """Stages of this rank."""
    runners: dict[tuple[int, bool], PipeRunner] = field(init=False, default_factory=dict)
    """(micro batches, whether there are backward passes) -> the passes of a step."""
    facts: Facts | None = field(init=False, default=None)
    """Of the micro batches of training; None before the first step and after a change of length."""
    total: Tensor = field(init=False)
    """Sum of the losses of the current step; 0 on ranks without the last stage."""

    def __post_init__(self) -> None:
        pipe, model = self.topology.pipe, self.deepspeed.module
        self.stages = [
            ChunkStage(partial(self._forward, chunk), stage, self.layout.stages, pipe=pipe, owner=self.layout.rank_of)
            for chunk, stage in enumerate(model.stages)
        ]

    def prepare(self, micro_batches: int, length: int) -> None:
        set_grad_accumulation(self.deepspeed, micro_batches)
        if length != self.length:
            self.length, self.facts = length, None

    def _run_micro_batches(self, batches: Iterator[MicroBatch]) -> Tensor:
        engine = self.deepspeed
        engine.module.train()
        self._watch_outliers()
        step = self._read(batches, engine.micro_batches)
        divisor = torch.ones((), device=engine.device)
        if step:
            divisor, self.learns = loss_divisor(step, self.topology, engine.device)
        self.facts = self.facts or self._share_facts(step)
        backward = Backward(self._backward, self.weight_gradients)
        total = self._run(step, self.facts, divisor, engine.micro_batches, backward)
        engine._exec_reduce_tied_grads()
        engine._exec_reduce_grads()
        engine._exec_optimizer_step()
        return self._from_last_stage(total / engine.micro_batches, self.topology.dp_cp) / self.topology.dp_cp.size

    def eval_sums(self, batches: Iterator[MicroBatch], count: int) -> tuple[float, float]:
        self.deepspeed.module.eval()
        step = self._read(batches, count)
        one = torch.ones((), device=self.deepspeed.device)
        with torch.no_grad():
            total = self._run(step, self._share_facts(step), one, count, None)
        tokens = torch.zeros((), dtype=torch.float64, device=self.deepspeed.device)
        if step:
            tokens += count_loss_tokens(step).to(tokens.device)
        losses = self._from_last_stage(total, self.topology.dp_cp)
        return float(losses), float(self._from_last_stage(tokens, self.topology.data))

    def _logits_of(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        return chunk_logits(
            self.deepspeed.module.chunk_layers,
            self.layout,
            tokens,
            cache,
            self.topology,
            received=self._received,
            padded_vocab_size=self.padded_vocab_size,
            dtype=self.dtype,
        )

    def _run(
        self, step: Sequence[MicroBatch], facts: Facts, divisor: Tensor, count: int, backward: Backward | None
    ) -> Tensor:
        """Runs the passes of a step; returns the sum of its losses, which is 0 on ranks without the last stage."""
        self.total = torch.zeros((), device=self.deepspeed.device)
        runner = self._runner(count, backward=backward is not None)
        batch, length, _, _ = facts
        parts = self.topology.context.size * (self.topology.model.size if self.topology.model.sequence_parallel else 1)
        for stage in self.stages:
            shape = self._received(stage.stage_index, length // parts, batch)
            stage.begin(torch.empty(shape, dtype=self.dtype, device="meta"), backward)
        shard = self._shards.shard
        first, last = (self.layout.rank_of(stage) == self.topology.pipe.rank for stage in (0, self.layout.stages - 1))
        runner.run(
            [shard(one.inputs) for one in step] if first else [],
            self._beside(step, facts, count),
            [(shard(one.labels), shard(one.loss_mask), divisor, *one.order) for one in step] if last else [],
        )
        return self.total

    def _received(self, stage: int, rows: int, batch: int) -> tuple[int, int, int]:
        """Returns the shape of a stage's input.

        Args:
            stage: its number in the model.
            rows: tokens of the residual stream of each sample.
            batch: samples.
        """
        return self.carry.into(self.deepspeed.module.parts[stage], rows, batch)

    def _runner(self, count: int, *, backward: bool) -> PipeRunner:
        """Returns the passes of a step of so many micro batches; made once."""
        key = (count, backward)
        if key not in self.runners:
            self.runners[key] = PipeRunner(self.stages, self.layout, count, self._loss, backward=backward)
        return self.runners[key]

    def _forward(self, chunk: int, carry: Tensor, **beside: Tensor) -> Tensor:
        with autocast_if_enabled(self.deepspeed):
            output: Tensor = self.deepspeed.module.run(chunk, carry, **beside)
        return output

    def _loss(self, output: Tensor, given: Any) -> Tensor:
        """Adds a micro batch's loss to the total; returns the start of its backward pass."""
        engine = self.deepspeed
        with autocast_if_enabled(engine):
            loss: Tensor = engine.module.loss_of(output, given)
        self.total += loss.detach()
        loss = engine.module.loss_to_learn(loss) / engine.gradient_accumulation_steps()
        if isinstance(engine.optimizer, ZeROOptimizer) and torch.is_grad_enabled():
            loss = engine.optimizer.scale_if_loss(loss)
        return loss

    def _backward(self, run: Callable[[], None]) -> None:
        """Runs a backward pass; DeepSpeed's bfloat16 optimizer adds its gradients to sums in fp32."""
        engine = self.deepspeed
        engine._running_engine_backward = True
        try:
            run()
        finally:
            engine._running_engine_backward = False
        if isinstance(engine.optimizer, BF16_Optimizer):
            engine.optimizer.update_hp_grads(clear_lp_grads=False)
            engine.optimizer.clear_lp_grads(set_to_none=True)

    def _read(self, batches: Iterator[MicroBatch], count: int) -> list[MicroBatch]:
        """Returns the next micro batches on the first and last rank; the ranks between read none."""
        if not (self.topology.pipe.is_first or self.topology.pipe.is_last):
            return []
        return [one.to(self.deepspeed.device, non_blocking=True) for one in islice(batches, count)]

    def _share_facts(self, step: Sequence[MicroBatch]) -> Facts:
        """Returns the facts of the first rank's micro batches. Collective over the pipe axis; the host waits."""
        pipe = self.topology.pipe
        numbers = torch.zeros(4, dtype=torch.int64, device=self.deepspeed.device)
        if pipe.is_first:
            one = step[0]
            known = (*one.tokens.shape, one.document_starts is not None, one.padding is not None)
            numbers += torch.tensor(known, device=numbers.device)
        dist.broadcast(numbers, src=pipe.ranks[0], group=pipe.group)
        batch, length, starts, padding = numbers.tolist()
        return batch, length, bool(starts), bool(padding)

    def _beside(self, step: Sequence[MicroBatch], facts: Facts, count: int) -> list[dict[str, Tensor]]:
        """Returns the tensors beside the carry of each micro batch, from the first rank. Collective over the pipe."""
        batch, length, has_starts, has_padding = facts
        found: list[dict[str, Tensor]] = [{} for _ in range(count)]
        pipe = self.topology.pipe
        for name, given in (("document_starts", has_starts), ("padding", has_padding)):
            if not given:
                continue
            own = [getattr(one, name) for one in step]
            width, dtype = (length, torch.int64)
            if name == "padding":  # starts are those of full sequences
                own, width, dtype = (
                    [self._shards.shard(one) for one in own],
                    length // self.topology.context.size,
                    torch.uint8,
                )
            sent = torch.empty(count, batch, width, dtype=dtype, device=self.deepspeed.device)
            if pipe.is_first:
                torch.stack([one.to(dtype) for one in own], out=sent)
            dist.broadcast(sent, src=pipe.ranks[0], group=pipe.group)
            for number, tensor in enumerate(own if pipe.is_first else sent.unbind()):
                found[number][name] = tensor.bool() if name == "padding" else tensor
        return found

    def _from_last_stage(self, value: Tensor, axis: Axis) -> Tensor:
        """Sums in place over an axis, and returns the last stage's sum on all ranks of the pipeline."""
        pipe = self.topology.pipe
        if axis.size > 1:
            dist.all_reduce(value, group=axis.group)
        dist.broadcast(value, src=pipe.ranks[self.layout.rank_of(self.layout.stages - 1)], group=pipe.group)
        return value
