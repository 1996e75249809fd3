"""Makes DeepSpeed detect that a model's experts are distributed over ranks.

Its engine looks for modules of its own class in the model; if there is one, it sums the gradients of parameters with
`allreduce = False` over the group that their `group_name` names only.
Source: deepspeed.runtime.engine (_configure_distributed_model, _get_gradients_for_reduction), release 0.19.
"""

from __future__ import annotations

from deepspeed.moe.layer import MoE
from torch import nn


class DeepSpeedExperts(MoE):
    """Empty marker module: DeepSpeed detects MoE by this class."""

    def __init__(self, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Does nothing: DeepSpeed requests its groups here, which the topology has created."""
