"""Training engine without pipeline stages: DeepSpeedEngine around one module, ZeRO 0 to 3.

s sequence, b micro batch, v vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.context_parallel.sequence_shards import SequenceShards
from megatron.distributed.process_group import device
from megatron.engine.accumulation_steps import set_grad_accumulation
from megatron.engine.base import BaseEngine
from megatron.engine.expert_gather import gather_experts
from megatron.engine.frozen_base import expanded
from megatron.engine.inference_forward import gather_context, gather_vocabulary, shard_prompt
from megatron.engine.loss_normalization import count_loss_tokens, loss_divisor, sum_over_data
from megatron.engine.prompt_offset import prepend_padding, prompt_offset
from megatron.model.kv_cache import KVCache
from megatron.model.loss_function import LossFunction


@dataclass(kw_only=True)
class PlainEngine(BaseEngine):
    """One module in one DeepSpeedEngine, without pipeline stages."""

    loss: LossFunction

    def prepare(self, micro_batches: int, length: int) -> None:
        set_grad_accumulation(self.deepspeed, micro_batches)

    def _run_micro_batches(self, batches: Iterator[MicroBatch]) -> Tensor:
        engine = self.deepspeed
        engine.module.train()
        total = torch.zeros((), device=engine.device)
        step = [next(batches).to(engine.device, non_blocking=True) for _ in range(engine.gradient_accumulation_steps())]
        tokens, self.learns = loss_divisor(step, self.topology, engine.device)
        if self.outliers is not None:
            self.outliers.begin(len(step), lambda sum_: self._sum(sum_) / (len(step) * self.topology.dp_cp.size))
        for batch in step:
            loss = self._forward(batch, tokens)
            total += loss.detach()
            engine.backward(loss if self.outliers is None else self.outliers(loss))
            engine.step()
        return self._sum(total) / (len(step) * self.topology.dp_cp.size)

    @property
    def min_eval_batches(self) -> int:
        return 1

    @torch.no_grad()
    def eval_sums(self, batches: Iterator[MicroBatch], count: int) -> tuple[float, float]:
        self.deepspeed.module.eval()
        total, tokens = torch.zeros(2, dtype=torch.float64, device=self.deepspeed.device)
        one = torch.ones((), device=self.deepspeed.device)
        for _ in range(count):
            batch = next(batches)
            total += self._forward(batch, one)
            tokens += count_loss_tokens([batch]).to(tokens.device)
        return float(self._sum(total)), float(sum_over_data(tokens, self.topology))

    @torch.no_grad()
    def logits(self, tokens: Tensor, cache: KVCache | None = None, at: Tensor | None = None) -> Tensor:
        self.deepspeed.module.eval()
        offset = prompt_offset(self.prompt, cache)
        part = shard_prompt(prepend_padding(tokens.to(device()), offset), cache, self.topology)
        logits = gather_vocabulary(self.deepspeed(part, cache), self.topology)
        logits = gather_context(logits, self.topology)[:, offset : offset + tokens.shape[1]]
        return logits if at is None else logits.flatten(0, 1)[at]

    def layers(self) -> dict[int, Module]:
        """Returns all layers by their index in the model."""
        return dict(enumerate(self.deepspeed.module.sequential))

    def weights(self) -> dict[str, Tensor]:
        """Returns key -> tensor-parallel shard; collective.

        At ZeRO 3 the shards are gathered one by one into the host memory of the ranks that save them; others get
        nothing.
        """
        is_saved = self.topology.dp_cp.is_first
        found = {key: _gather_shard(parameter, is_saved) for key, parameter in self.parameters.items()}
        base = expanded(self.stored_base, is_saved=is_saved)
        return {key: value for key, value in found.items() if value is not None} | base | self.biases

    def owned(self) -> dict[str, Parameter]:
        """Returns key -> parameter; without stages every rank has all of them."""
        return self.parameters

    def _forward(self, batch: MicroBatch, tokens: Tensor) -> Tensor:
        """Returns the sum of the losses of this rank's shard of the sequences, divided by `tokens`."""
        batch = batch.to(self.deepspeed.device)
        part = SequenceShards.of(self.topology).shard
        given = (part(batch.labels), part(batch.loss_mask), tokens, *batch.order)
        targets = self.loss.targets(*given)
        padding = None if batch.padding is None else part(batch.padding)
        output: Tensor = self.deepspeed(part(batch.inputs), None, batch.document_starts, targets, padding)
        return output if targets is not None else self.loss(output, *given)

    def _sum(self, value: Tensor) -> Tensor:
        """Sums in place over data- and context-parallel ranks."""
        axis = self.topology.dp_cp
        if axis.size > 1:
            dist.all_reduce(value, group=axis.group)
        return value


def keyed_parameters(module: Module, prefix: str = "sequential.") -> dict[str, Parameter]:
    """Returns key -> parameter of a module whose layers are under `sequential.<layer>.`."""
    return {name.removeprefix(prefix): parameter for name, parameter in module.named_parameters()}


def _gather_shard(parameter: Parameter, is_saved: bool) -> Tensor | None:
    """Returns the tensor-parallel shard, gathered from the ranks of ZeRO 3 or expert parallelism.

    is_saved: true if this rank saves it; at ZeRO 3 others get None.
    """
    if not hasattr(parameter, "ds_id"):
        return gather_experts(parameter)
    from deepspeed import zero

    with zero.GatheredParameters([parameter]):
        return parameter.detach().to("cpu", copy=True) if is_saved else None
