"""Objectives on preferences and rewards: dpo, kto, rm and reinforce."""

from megatron.config.field import Section, key
from megatron.config.types import Integers, Strings


class PreferenceSection(Section):
    """Objectives after pretraining, and the servers that online training talks to."""

    dpo_fp32: bool = key(True, "Compute the dpo loss in fp32.")
    dpo_reference_free: bool = key(False, "Leave the reference model out of the dpo loss.")
    dpo_beta: float = key(0.1, "Strength of the pull towards the reference model, arXiv:2305.18290.")
    z_loss: float = key(0.0, "Weight of the squared rewards in the rm loss, which keeps them near zero.")
    kto_fp32: bool = key(True, "Compute the kto loss in fp32.")
    kto_desirable_weight: float = key(1.0, "Weight of desirable samples, arXiv:2402.01306.")
    kto_undesirable_weight: float = key(1.0, "Weight of undesirable samples.")
    kto_beta: float = key(0.1, "Strength of the pull towards the reference model.")
    fp32_reinforce: bool = key(True, "Compute the reinforce loss in fp32.")
    kl_impl: str = key("mse", "Estimate of the divergence from the reference.", choices=("abs", "mse", "kl", "full"))
    kl_div_beta: float = key(0.1, "Weight of the divergence from the reference.")
    reinforce_leave_one_out: bool = key(False, "Subtract the mean reward of the other samples of a prompt.")
    serve_model_weights: bool = key(False, "Serve the weights to a generation server while training.")
    weight_server_port: int | Integers = key(6000, "Port of the weight server.")
    online_dataserver_ips: str | Strings = key("localhost", "Hosts that send samples to online training.")
    online_dataserver_ports: int | Integers = key(10000, "Their ports.")
