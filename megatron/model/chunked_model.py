"""The layers of a pipeline rank that holds several stages of the model, called chunks.

s sequence, b micro batch, h hidden, v vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron.distributed.mesh import Topology
from megatron.model.layers import LayerSpec
from megatron.model.loss_function import LossFunction
from megatron.model.multi_token import FurtherLosses
from megatron.model.pipeline_model import PipelinedModel, differentiable, free_logits_after_loss
from megatron.model.recompute import Recompute, run_layers
from megatron.pipe_schedule.layout import PipeLayout


class ChunkedModel(PipelinedModel):
    """The chunks of one pipeline rank. A tied embedding whose two uses are on one rank is one module there."""

    def __init__(
        self,
        layer_specs: Sequence[LayerSpec],
        topology: Topology,
        *,
        partition_method: str | tuple[int, ...],
        loss: LossFunction,
        layout: PipeLayout,
        recompute: Recompute | None = None,
        further: FurtherLosses | None = None,
    ) -> None:
        """Builds the layers of this rank.

        Args:
            layer_specs: layers of the full model.
            topology: layout of the ranks.
            partition_method: as for PipelinedModel, for all stages of the model.
            loss: called on the last stage.
            layout: which stages each rank holds.
            recompute: recomputation of blocks, or None.
            further: not used; rules refuse modules that predict further tokens.
        """
        self.layout = layout
        self.stages = layout.stages_of(topology.pipe.rank)
        self.chunk_layers: list[list[Any]] = []
        super().__init__(layer_specs, topology, partition_method=partition_method, loss=loss, recompute=recompute)
        if self.masked_head is not None:
            self.chunk_layers[-1][-1] = self.masked_head

    def run(
        self, chunk: int, carry: Tensor, document_starts: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """Runs a chunk: tokens [b, s] or hidden [s, b, h] -> hidden [s, b, h] or logits [s, b, v/t].

        Where the loss is computed together with the output layer, the last stage ends before it.

        Args:
            chunk: index of the chunk on this rank.
            carry: input of the chunk.
            document_starts: as for run_layers.
            padding: as for run_layers.
        """
        layers = self.chunk_layers[chunk]
        if self.stages[chunk] == self.layout.stages - 1 and self.loss.in_blocks:
            layers = layers[:-1]
        return differentiable(run_layers(layers, carry, None, self.recompute, document_starts, padding))

    def loss_of(self, output: Tensor, given: tuple[Tensor, ...]) -> Tensor:
        """Returns the loss of the last stage's output. given: as for `PipelinedModel`."""
        targets = self.loss.targets(*given)
        if targets is None:
            return free_logits_after_loss(self.loss(output, *given), output)
        value: Tensor = self.chunk_layers[-1][-1](output, targets=targets)
        return value

    @property
    def layer_range(self) -> Sequence[int]:
        """Indices of this rank's layers in the model."""
        return [index for stage in self.stages for index in range(self.parts[stage], self.parts[stage + 1])]

    def stage_owner(self, layer_idx: int) -> int:
        """Returns the pipeline rank that holds a layer."""
        return self.layout.rank_of(super().stage_owner(layer_idx))

    def _partition_layers(self, method: str | tuple[int, ...] = "uniform") -> None:
        self.num_stages = self.layout.stages
        super()._partition_layers(method)

    def _build(self) -> None:
        """Builds the chunks one after the other."""
        for stage in self.stages:
            built = len(self.forward_funcs)
            self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])
            super()._build()
            self.chunk_layers.append(self.forward_funcs[built:])
