"""The engine of a model that is not cut into pipeline stages: DeepSpeedEngine around one module, ZeRO 0 to 3.

s sequence, b micro batch, v vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.context_parallel import shard_sequence
from megatron.distributed.process_group import device
from megatron.engine.base import BaseEngine
from megatron.engine.expert_gather import all_experts
from megatron.engine.grad_accumulation import accumulate
from megatron.engine.inference_forward import for_sequence_cuts, gather_context, gather_vocabulary
from megatron.engine.loss_normalization import loss_divisor, sum_over_data, unmasked
from megatron.engine.prompt_offset import behind, prompt_offset
from megatron.model.kv_cache import KVCache

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(logits [s, b, v/t], labels [b, s], loss mask [b, s], tokens) -> the sum of the unmasked tokens' losses / tokens."""


@dataclass(kw_only=True)
class PlainEngine(BaseEngine):
    """One module in one DeepSpeedEngine, without pipeline stages."""

    loss: Loss

    def prepare(self, micro_batches: int, length: int) -> None:
        accumulate(self.deepspeed, micro_batches)

    def _run_micro_batches(self, batches: Iterator[MicroBatch]) -> Tensor:
        engine = self.deepspeed
        engine.module.train()
        total = torch.zeros((), device=engine.device)
        step = [next(batches) for _ in range(engine.gradient_accumulation_steps())]
        tokens = loss_divisor(step, self.topology, engine.device)
        for batch in step:
            loss = self._forward(batch, tokens)
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        return self._sum(total) / (len(step) * self.topology.dp_cp.size)

    @property
    def least_evaluated(self) -> int:
        return 1

    @torch.no_grad()
    def eval_sums(self, batches: Iterator[MicroBatch], count: int) -> tuple[float, float]:
        self.deepspeed.module.eval()
        total, tokens = torch.zeros(2, dtype=torch.float64, device=self.deepspeed.device)
        one = torch.ones((), device=self.deepspeed.device)
        for _ in range(count):
            batch = next(batches)
            total += self._forward(batch, one)
            tokens += unmasked([batch]).to(tokens.device)
        return float(self._sum(total)), float(sum_over_data(tokens, self.topology))

    @torch.no_grad()
    def logits(self, tokens: Tensor, cache: KVCache | None = None, at: Tensor | None = None) -> Tensor:
        self.deepspeed.module.eval()
        places = prompt_offset(self.prompt, cache)
        part = for_sequence_cuts(behind(tokens.to(device()), places), cache, self.topology)
        logits = gather_vocabulary(self.deepspeed(part, cache), self.topology)
        logits = gather_context(logits, self.topology)[:, places : places + tokens.shape[1]]
        return logits if at is None else logits.flatten(0, 1)[at]

    def layers(self) -> dict[int, Module]:
        """The layers of this rank, by their index in the plan."""
        return dict(enumerate(self.deepspeed.module.sequential))

    def weights(self) -> dict[str, Tensor]:
        """Key -> this rank's tensor-parallel shard; under ZeRO 3 every rank takes part in putting it together.

        There the shards come one by one into the host's memory of those that write them, and the others get nothing.
        """
        keeps = self.topology.dp_cp.is_first
        found = {key: _whole(parameter, keeps) for key, parameter in self.parameters.items()}
        return {key: value for key, value in found.items() if value is not None}

    def owned(self) -> dict[str, Parameter]:
        """Key -> parameter that this rank answers for."""
        return self.parameters

    def _forward(self, batch: MicroBatch, tokens: Tensor) -> Tensor:
        """The sum of the losses of this rank's part of the sequences, divided by `tokens`."""
        batch = batch.to(self.deepspeed.device)
        part = partial(shard_sequence, axis=self.topology.context)
        logits = self.deepspeed(part(batch.tokens), None, batch.document_starts)
        return self.loss(logits, part(batch.labels), part(batch.loss_mask), tokens)

    def _sum(self, value: Tensor) -> Tensor:
        """The sum, in place, over the data-parallel ranks and those that share their sequences."""
        axis = self.topology.dp_cp
        if axis.size > 1:
            dist.all_reduce(value, group=axis.group)
        return value


def keyed_parameters(module: Module, prefix: str = "sequential.") -> dict[str, Parameter]:
    """Key -> parameter of a module whose layers are under `sequential.<layer>.`."""
    return {name.removeprefix(prefix): parameter for name, parameter in module.named_parameters()}


def _whole(parameter: Parameter, keeps: bool) -> Tensor | None:
    """The tensor-parallel shard, gathered from the ranks that ZeRO 3 or expert parallelism has spread it over.

    keeps: whether it is wanted here; None under ZeRO 3 where it is not.
    """
    if not hasattr(parameter, "ds_id"):
        return all_experts(parameter)
    from deepspeed import zero

    with zero.GatheredParameters([parameter]):
        return parameter.detach().to("cpu", copy=True) if keeps else None
