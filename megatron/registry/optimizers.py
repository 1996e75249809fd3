"""Optimizers, and their 8-bit forms."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.registry.entry import OptimizerEntry, Setting
from megatron.registry.kernels import FUSED_ADAM, NEWTON_SCHULZ
from megatron.registry.registry import Registry

NEEDS_FULL_TENSORS = frozenset({"full_tensors"})
"""The step needs tensors in their shape; ZeRO makes flat shards of them."""
HANDLES_ZERO1 = frozenset({"zero1"})
"""The optimizer gathers full tensors from ZeRO 1 shards itself, in bfloat16."""
ENTRYWISE = frozenset({"entrywise"})
"""The size of the step does not depend on the size of the gradient; muP has rules for it."""
PROPORTIONAL = frozenset({"proportional"})
"""The step is proportional to the gradient; muP has rules for it."""
ADAM_STATE = ENTRYWISE | {"moments"}
"""The state is Adam's two moments, so that such optimizers can load each other's state."""
COMPRESSED_COMM = ADAM_STATE | {"compressed_comm"}
"""The optimizer communicates compressed momenta in place of gradients, which ZeRO would reduce."""
CPU_OFFLOAD = ADAM_STATE | {"cpu_offload"}
"""The optimizer updates parameters in the host's memory."""

NUMBER, FRACTION, COUNT, SWITCH, BETAS = map(Setting, ("number", "fraction", "count", "switch", "betas"))
DEEPSPEED_COMM = "torch.distributed carries the momenta"
ADAM = {"betas": BETAS, "eps": NUMBER, "bias_correction": SWITCH, "adam_w_mode": SWITCH}
TORCH_ADAM = {**ADAM, "amsgrad": SWITCH}
ADAM_ON_GPU = {**TORCH_ADAM, "torch_adam": Setting("switch", unused="torch's fused kernel always runs")}
ONE_BIT = {
    "betas": BETAS,
    "eps": NUMBER,
    "freeze_step": COUNT,
    "cuda_aware": Setting("switch", unused=DEEPSPEED_COMM),
    "comm_backend_name": Setting("any", unused=DEEPSPEED_COMM),
}
SGD = {"momentum": FRACTION, "dampening": FRACTION, "nesterov": SWITCH}
SM3 = {"momentum": FRACTION, "beta": FRACTION, "eps": NUMBER}
ADAFACTOR = {"beta2_decay": NUMBER, "eps": NUMBER, "d": NUMBER}
ADEMAMIX = {"betas": BETAS, "beta3": FRACTION, "alpha": NUMBER, "slow_warmup": COUNT, "eps": NUMBER}
SOAP = {"betas": BETAS, "eps": NUMBER, "precondition_frequency": COUNT, "max_dim": COUNT}
SHAMPOO = {
    "betas": BETAS,
    "eps": NUMBER,
    "start_step": COUNT,
    "precondition_frequency": COUNT,
    "block_size": COUNT,
    "max_dim": COUNT,
    "graft": Setting("choice", choices=("rmsprop", "adagrad", "sgd")),
}
SCHEDULE_FREE = {"betas": BETAS, "eps": NUMBER, "r": NUMBER, "lr_power": NUMBER}
MUON = {
    "momentum": FRACTION,
    "nesterov": SWITCH,
    "ns_steps": COUNT,
    "adjust_lr_fn": Setting("choice", choices=("match_rms_adamw", "original")),
    "split_experts": SWITCH,
    "split_qkv": SWITCH,
    "split_heads": SWITCH,
    "ns_coefficients": Setting("choice", choices=("standard", "polar_express")),
    "normuon": SWITCH,
    "normuon_beta2": FRACTION,
    "qk_clip_threshold": NUMBER,
    "momentum_dtype": Setting("choice", choices=("fp32", "bfloat16")),
    "betas": BETAS,
    "eps": NUMBER,
}


def _optimizer(
    name: str,
    target: str,
    doc: str,
    settings: Mapping[str, Setting],
    *,
    state_per_param: float,
    traits: frozenset[str] = frozenset(),
    extra: str | None = None,
    kernel: str | None = None,
) -> OptimizerEntry:
    return OptimizerEntry(
        name,
        f"megatron.optim.{target}",
        doc,
        extra,
        traits,
        settings=settings,
        state_per_param=state_per_param,
        kernel=kernel,
    )


OPTIMIZERS = Registry(
    "optimizer",
    "optimizer",
    [
        _optimizer(
            "adam",
            "adam:build",
            "Adam, arXiv:1711.05101",
            ADAM_ON_GPU,
            state_per_param=2,
            traits=ADAM_STATE,
            kernel=FUSED_ADAM,
        ),
        _optimizer(
            "cpu_adam", "cpu_adam:build", "Adam on the host, by DeepSpeed", ADAM, state_per_param=2, traits=CPU_OFFLOAD
        ),
        _optimizer(
            "cpu_torch_adam",
            "adam:build_on_cpu",
            "Adam in plain operations",
            TORCH_ADAM,
            state_per_param=2,
            traits=ADAM_STATE,
        ),
        _optimizer(
            "onebitadam",
            "onebit:build",
            "1-bit Adam, arXiv:2102.02888",
            ONE_BIT,
            state_per_param=3,
            traits=COMPRESSED_COMM,
        ),
        _optimizer("sgd", "sgd:build", "Descent with momentum", SGD, state_per_param=1, traits=PROPORTIONAL),
        _optimizer(
            "lion",
            "lion:build",
            "Lion, arXiv:2302.06675",
            {"betas": BETAS},
            state_per_param=1,
            traits=ENTRYWISE,
            extra="optimizers",
        ),
        _optimizer(
            "madgrad_wd",
            "madgrad:build",
            "MADGRAD, arXiv:2101.11075",
            {"momentum": FRACTION, "eps": NUMBER},
            state_per_param=3,
            extra="optimizers",
        ),
        _optimizer(
            "sm3",
            "sm3:build",
            "SM3, arXiv:1901.11150",
            SM3,
            state_per_param=1,
            traits=NEEDS_FULL_TENSORS,
            extra="optimizers",
        ),
        _optimizer(
            "adafactor",
            "adafactor:build",
            "Adafactor, arXiv:1804.04235",
            ADAFACTOR,
            state_per_param=0,
            traits=NEEDS_FULL_TENSORS,
        ),
        _optimizer(
            "ademamix",
            "ademamix:build",
            "AdEMAMix, arXiv:2409.03137",
            ADEMAMIX,
            state_per_param=3,
            extra="optimizers",
        ),
        _optimizer(
            "schedulefree",
            "schedule_free:build",
            "Schedule-free AdamW, arXiv:2405.15682",
            SCHEDULE_FREE,
            state_per_param=2,
            extra="optimizers",
        ),
        _optimizer(
            "soap",
            "soap:build",
            "SOAP, arXiv:2409.11321",
            SOAP,
            state_per_param=4,
            traits=NEEDS_FULL_TENSORS,
            extra="optimizers",
        ),
        _optimizer(
            "shampoo",
            "shampoo:build",
            "Shampoo, arXiv:1802.09568",
            SHAMPOO,
            state_per_param=7,
            traits=NEEDS_FULL_TENSORS,
            extra="optimizers",
        ),
        _optimizer(
            "muon",
            "muon:build",
            "Muon, arXiv:2502.16982",
            MUON,
            state_per_param=2,
            traits=NEEDS_FULL_TENSORS | HANDLES_ZERO1,
            kernel=NEWTON_SCHULZ,
        ),
    ],
)

EIGHT_BIT = Registry(
    "8-bit optimizer",
    "use_bnb_optimizer",
    [
        _optimizer(
            "adam",
            "bitsandbytes:build_adam",
            "8-bit Adam",
            {"betas": BETAS, "eps": NUMBER},
            state_per_param=0.5,
            extra="bitsandbytes",
        ),
        _optimizer(
            "lion",
            "bitsandbytes:build_lion",
            "8-bit Lion",
            {"betas": BETAS},
            state_per_param=0.25,
            extra="bitsandbytes",
        ),
        _optimizer(
            "sgd",
            "bitsandbytes:build_sgd",
            "8-bit descent",
            {"momentum": FRACTION, "nesterov": SWITCH},
            state_per_param=0.25,
            extra="bitsandbytes",
        ),
    ],
)
