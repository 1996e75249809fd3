"""Shared experts: one MLP that every token goes through, beside those of the router (arXiv:2401.06066).

With a gate, each token's output is multiplied by a sigmoid of a linear function of the token, as in Qwen2-MoE.
Several shared experts of one width are one MLP of the sum of their widths.

Shapes: n tokens, h hidden, w width, t tensor-parallel degree.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.adapter_config import SHARED_IN, SHARED_OUT
from megatron.distributed.collectives import copy_to
from megatron.distributed.param_init import ParamFactory
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.model.block_spec import BlockSpec


class SharedExperts(nn.Module):
    """The MLP and its gate, if it has one."""

    def __init__(self, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        hidden, mixture, kernel = spec.dims.hidden_size, spec.dims.mixture, spec.kernels.linear
        width, self.axis, self.activation = mixture.shared_width, source.axis, spec.activation
        sections = (width, width) if spec.dims.gated else ()
        self.linear1 = ColumnParallelLinear(
            hidden,
            sum(sections) or width,
            source.of("linear1"),
            init_fn=spec.init_fn,
            bias=False,
            sections=sections,
            kernel=kernel,
            lora=spec.lora_specs.get(SHARED_IN),
            full_sequence=True,
        )
        self.linear2 = RowParallelLinear(
            width,
            hidden,
            source.of("linear2"),
            init_fn=spec.output_init_fn,
            bias=False,
            kernel=kernel,
            lora=spec.lora_specs.get(SHARED_OUT),
        )
        self.gate = TokenGate(spec, source.of("gate")) if mixture.shared_gate else None

    def partial(self, outside: Tensor, inside: Tensor) -> Tensor:
        """Tokens [n, h] -> this rank's term [n, h] of the sum over ranks.

        Args:
            outside: the tokens for what every rank computes alike.
            inside: the tokens for what each rank computes a term of.
        """
        inner = self.linear1.of_gathered(outside, inside)  # [n, w/t]
        total = self.linear2.partial(self.activation(inner))  # [n, h]
        return total if self.gate is None else total * copy_to(self.gate(outside), self.axis)


class TokenGate(nn.Module):
    """A sigmoid of a linear function of the token: ``weight`` [1, h]."""

    def __init__(self, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        self.weight = source.replicated("weight", (1, spec.dims.hidden_size), spec.init_fn, full_sequence=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, h] -> [n, 1]."""
        return F.linear(tokens, self.weight).sigmoid()
