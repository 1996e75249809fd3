"""Mixture of experts."""

from megatron.config.field import Section, key
from megatron.registry import ROUTERS


class MoeSection(Section):
    """Experts and their router."""

    moe_num_experts: int = key(1, "Experts in each MoE block; 1 is a plain MLP.", unit="experts")
    moe_expert_interval: int = key(1, "Every n-th block has experts.", unit="blocks")
    moe_top_k: int = key(1, "Experts of each token.", unit="experts")
    moe_router_type: str = key("sinkhorn", "How tokens are assigned to experts.", choices=ROUTERS)
    moe_normalize_top_k: bool = key(False, "Normalise the weights of a token's experts to sum to 1, as Mixtral does.")
    moe_lbl_in_fp32: bool = key(False, "Compute the load balancing loss in fp32.")
    moe_jitter_eps: float | None = key(None, "Multiply the router's input by uniform noise in 1 +- this.")
    moe_expert_parallel_size: int = key(1, "Ranks over which the experts of a block are sharded.", unit="ranks")
    moe_aux_loss_coeff: float = key(0.0, "Weight of the load balancing loss, arXiv:2101.03961 equation 4.")
    moe_z_loss_coeff: float = key(0.0, "Weight of the router's z-loss, arXiv:2202.08906 equation 5.")
    moe_capacity_factor: float | None = key(
        None, "Capacity of an expert in training, as a multiple of tokens / experts; no token is dropped when left out."
    )
    moe_eval_capacity_factor: float | None = key(None, "The same for the validation loss; generation drops no token.")
    moe_min_capacity: int = key(4, "Least capacity of an expert.", unit="tokens")
