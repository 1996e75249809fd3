"""Runs the passes of a schedule in their order, with torch's pipeline runtime.

The runtime (torch.distributed.pipelining) places sends and receives between the passes so that no two ranks wait for
each other, and waits for what a pass needs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.pipelining import schedules

from megatron.engine.pipe_stage import ChunkStage
from megatron.pipe_schedule.layout import PipeLayout
from megatron.pipe_schedule.order import forward_order, order_of

LossOf = Callable[[Tensor, Any], Tensor]


class PipeRunner(schedules._PipelineScheduleRuntime):
    """The passes of one step of this rank."""

    def __init__(
        self, stages: Sequence[ChunkStage], layout: PipeLayout, micro_batches: int, loss_of: LossOf, *, backward: bool
    ) -> None:
        """Creates the order of a training step, or of forward passes only.

        Args:
            stages: stages of this rank.
            layout: the schedule.
            micro_batches: micro batches of a step.
            loss_of: returns the loss of the last stage's output and a target.
            backward: false for forward passes only.
        """
        logging.getLogger(schedules.__name__).setLevel(logging.CRITICAL)  # an error would print every pass of the step
        super().__init__(list(stages), micro_batches, loss_fn=loss_of, scale_grads=False)
        self._has_backward = backward
        order = order_of(layout, micro_batches) if backward else forward_order(layout, micro_batches)
        actions = {
            rank: [schedules._Action.from_str(f"{work.stage}{work.kind}{work.batch}") for work in passes]
            for rank, passes in enumerate(order)
        }
        self.stage_index_to_group_rank = {stage: layout.rank_of(stage) for stage in range(layout.stages)}
        self.pipeline_order_with_comms = schedules._add_send_recv(actions, layout.rank_of, layout.stages)

    def run(self, tokens: Sequence[Tensor], beside: Sequence[dict[str, Tensor]], targets: Sequence[Any]) -> None:
        """Runs a step.

        Args:
            tokens: of each micro batch [b, s], where this rank holds the first stage.
            beside: tensors beside the carry, of each micro batch.
            targets: second argument of loss_of for each micro batch, where this rank holds the last stage.
        """
        inputs: list[tuple[Tensor, ...]] = [(one,) for one in tokens] or [()] * len(beside)
        self._step_microbatches(inputs, list(beside), list(targets) or None, [], return_outputs=False)

    def _initialize_stages(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: shapes are known, and the stages allocate what they receive."""
