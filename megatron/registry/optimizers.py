"""Optimizers, and those of them with 8-bit state."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.registry.entry import OptimizerEntry, Setting
from megatron.registry.family import Family

NEEDS_FULL_TENSORS = frozenset({"whole"})
"""Its step needs tensors in their shape; ZeRO makes flat shards of them."""
HANDLES_ZERO1 = frozenset({"pieces"})
"""Builds full tensors from the shards of ZeRO 1 itself, in bfloat16."""
ENTRYWISE = frozenset({"entrywise"})
"""Its step has a size of its own in every element, whatever the size of the gradient; muP has rules for it."""
PROPORTIONAL = frozenset({"proportional"})
"""Its step is as large as the gradient; muP has rules for it."""
ADAM_STATE = ENTRYWISE | {"moments"}
"""Keeps the two moments of Adam, so that such optimizers go on with each other's state."""
COMPRESSED_COMM = ADAM_STATE | {"local"}
"""Exchanges something else than gradients, which ZeRO would sum."""
CPU_OFFLOAD = ADAM_STATE | {"host"}
"""Updates parameters in the host's memory."""

NUMBER, FRACTION, COUNT, SWITCH, BETAS = map(Setting, ("number", "fraction", "count", "switch", "betas"))
DEEPSPEED_COMM = "torch.distributed carries the momenta"
ADAM = {"betas": BETAS, "eps": NUMBER, "bias_correction": SWITCH, "adam_w_mode": SWITCH}
TORCH_ADAM = {**ADAM, "amsgrad": SWITCH}
FUSED_ADAM = {**TORCH_ADAM, "torch_adam": Setting("switch", unused="torch's fused kernel always runs")}
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
MUON = {
    "momentum": FRACTION,
    "nesterov": SWITCH,
    "ns_steps": COUNT,
    "adjust_lr_fn": Setting("choice", choices=("match_rms_adamw", "original")),
    "betas": BETAS,
    "eps": NUMBER,
}


def _optimizer(
    name: str,
    target: str,
    doc: str,
    settings: Mapping[str, Setting],
    *,
    moments: float,
    traits: frozenset[str] = frozenset(),
    extra: str | None = None,
) -> OptimizerEntry:
    return OptimizerEntry(name, f"megatron.optim.{target}", doc, extra, traits, settings=settings, moments=moments)


OPTIMIZERS = Family(
    "optimizer",
    "optimizer",
    [
        _optimizer("adam", "adam:build", "Adam, arXiv:1711.05101", FUSED_ADAM, moments=2, traits=ADAM_STATE),
        _optimizer("cpu_adam", "cpu_adam:build", "Adam on the host, by DeepSpeed", ADAM, moments=2, traits=CPU_OFFLOAD),
        _optimizer(
            "cpu_torch_adam", "adam:build_on_cpu", "Adam in plain operations", TORCH_ADAM, moments=2, traits=ADAM_STATE
        ),
        _optimizer(
            "onebitadam", "onebit:build", "1-bit Adam, arXiv:2102.02888", ONE_BIT, moments=3, traits=COMPRESSED_COMM
        ),
        _optimizer("sgd", "sgd:build", "Descent with momentum", SGD, moments=1, traits=PROPORTIONAL),
        _optimizer(
            "lion",
            "lion:build",
            "Lion, arXiv:2302.06675",
            {"betas": BETAS},
            moments=1,
            traits=ENTRYWISE,
            extra="optimizers",
        ),
        _optimizer(
            "madgrad_wd",
            "madgrad:build",
            "MADGRAD, arXiv:2101.11075",
            {"momentum": FRACTION, "eps": NUMBER},
            moments=3,
            extra="optimizers",
        ),
        _optimizer(
            "sm3", "sm3:build", "SM3, arXiv:1901.11150", SM3, moments=1, traits=NEEDS_FULL_TENSORS, extra="optimizers"
        ),
        _optimizer(
            "adafactor",
            "adafactor:build",
            "Adafactor, arXiv:1804.04235",
            ADAFACTOR,
            moments=0,
            traits=NEEDS_FULL_TENSORS,
        ),
        _optimizer(
            "muon", "muon:build", "Muon, arXiv:2502.16982", MUON, moments=2, traits=NEEDS_FULL_TENSORS | HANDLES_ZERO1
        ),
    ],
)

EIGHT_BIT = Family(
    "8-bit optimizer",
    "use_bnb_optimizer",
    [
        _optimizer(
            "adam",
            "bitsandbytes:build_adam",
            "8-bit Adam",
            {"betas": BETAS, "eps": NUMBER},
            moments=0.5,
            extra="bitsandbytes",
        ),
        _optimizer(
            "lion", "bitsandbytes:build_lion", "8-bit Lion", {"betas": BETAS}, moments=0.25, extra="bitsandbytes"
        ),
        _optimizer(
            "sgd",
            "bitsandbytes:build_sgd",
            "8-bit descent",
            {"momentum": FRACTION, "nesterov": SWITCH},
            moments=0.25,
            extra="bitsandbytes",
        ),
    ],
)
