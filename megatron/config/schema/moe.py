"""Mixture of experts."""

from megatron.config.field import Section, key
from megatron.config.types import Integers
from megatron.expert_blocks import has_experts
from megatron.registry import ROUTERS


class MoeSection(Section):
    """Experts and their router."""

    def has_experts(self, block: int) -> bool:
        """Returns whether a block that attends has experts. block: from 0."""
        where = {"interval": self.moe_expert_interval, "first_dense": self.moe_first_k_dense_replace}
        return self.moe_num_experts > 1 and has_experts(block, **where, listed=self.moe_layer_freq)

    moe_num_experts: int = key(1, "Experts in each MoE block; 1 is a plain MLP.", unit="experts")
    moe_expert_interval: int = key(1, "Every n-th block has experts.", unit="blocks")
    moe_first_k_dense_replace: int = key(0, "First blocks with one plain MLP instead of experts.", unit="blocks")
    moe_layer_freq: Integers | None = key(
        None, "For each block 1 (experts) or 0 (one plain MLP), instead of the two keys above."
    )
    moe_ffn_hidden_size: int | None = key(
        None, "Inner width of an expert, as it is; the width of the plain MLP when left out.", unit="features"
    )
    moe_use_bias_in_experts: bool = key(False, "Biases in the experts' projections.")
    moe_use_bias_in_router: bool = key(False, "A bias of the router's logits, as in GPT-OSS.")
    moe_shared_expert_intermediate_size: int | None = key(
        None, "Inner width of the shared experts together, which every token goes through.", unit="features"
    )
    moe_shared_expert_gate: bool = key(False, "Multiply the shared experts by a sigmoid of the token, as Qwen2-MoE.")
    moe_top_k: int = key(1, "Experts of each token.", unit="experts")
    moe_router_type: str = key("sinkhorn", "How tokens are assigned to experts.", choices=ROUTERS)
    moe_normalize_top_k: bool = key(False, "Normalise the weights of a token's experts to sum to 1, as Mixtral does.")
    moe_router_score_function: str = key(
        "softmax", "What a token's logits become over all experts.", choices=("softmax", "sigmoid")
    )
    moe_router_pre_softmax: bool = key(True, "Softmax over all experts; false: over those of the token alone.")
    moe_router_num_groups: int | None = key(
        None, "Groups of neighbouring experts, of which a token uses a few; one group when left out.", unit="groups"
    )
    moe_router_group_topk: int | None = key(None, "Groups of a token.", unit="groups")
    moe_router_group_experts: int = key(
        2, "Experts with the highest scores whose sum is the score of a group.", unit="experts"
    )
    moe_router_topk_scaling_factor: float = key(1.0, "Factor of the weights of a token's experts.")
    moe_router_enable_expert_bias: bool = key(
        False, "Balance experts without a loss, by a bias in the choice of experts, arXiv:2408.15664."
    )
    moe_router_bias_update_rate: float = key(1e-3, "Change of that bias after each step.")
    moe_lbl_in_fp32: bool = key(False, "Compute the load balancing loss in fp32.")
    moe_jitter_eps: float | None = key(None, "Multiply the router's input by uniform noise in 1 +- this.")
    moe_expert_parallel_size: int = key(1, "Ranks over which the experts of a block are sharded.", unit="ranks")
    moe_aux_loss_coeff: float = key(0.0, "Weight of the load balancing loss, arXiv:2101.03961 equation 4.")
    moe_seq_aux_loss_coeff: float = key(0.0, "Weight of the balance loss of each sequence, arXiv:2412.19437.")
    moe_global_aux_loss_coeff: float = key(
        0.0, "Weight of the balance loss with the counts of the whole step so far, arXiv:2501.11873."
    )
    moe_z_loss_coeff: float = key(0.0, "Weight of the router's z-loss, arXiv:2202.08906 equation 5.")
    moe_capacity_factor: float | None = key(
        None, "Capacity of an expert in training, as a multiple of tokens / experts; no token is dropped when left out."
    )
    moe_eval_capacity_factor: float | None = key(None, "The same for the validation loss; generation drops no token.")
    moe_min_capacity: int = key(4, "Least capacity of an expert.", unit="tokens")
