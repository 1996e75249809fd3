"""How DeepSpeed learns that a model's experts are spread over ranks.

Its engine looks for modules of its own class among those of the model; where it finds one, it sums the gradients of
parameters that carry `allreduce = False` over the group that their `group_name` names, and no others.
Source: deepspeed.runtime.engine (_configure_distributed_model, _get_gradients_for_reduction), release 0.19.
"""

from __future__ import annotations

from deepspeed.moe.layer import MoE
from torch import nn


class DeepSpeedExperts(MoE):
    """Says that there are experts, and holds nothing of them."""

    def __init__(self, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed asks for its groups to be made here; the topology has made them."""
