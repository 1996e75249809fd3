"""Models whose numbers of parameters are published, as flat configurations."""

from __future__ import annotations

from typing import Any

from megatron.config import Resolution, Resources, resolve

RUN: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "train_iters": 10,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
    "make_vocab_size_divisible_by": 1,
    "tokenizer_type": "HFTokenizer",
}

NEOX = {"pos_emb": "rotary", "rotary_pct": 0.25, "gpt_j_residual": True, "no_weight_tying": True, "seq_length": 2048}

LLAMA = {
    "pos_emb": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "no_weight_tying": True,
    "seq_length": 4096,
    "vocab_size": 32000,
}


def sizes(layers: int, hidden: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, **more}


MODELS: dict[str, tuple[dict[str, Any], int]] = {
    # openai-community/gpt2 on the Hugging Face hub
    "gpt2": ({**sizes(12, 768, 12), "seq_length": 1024, "vocab_size": 50257}, 124_439_808),
    # arXiv:2204.06745 section 2: 20,554,567,680 parameters
    "20B": ({**NEOX, **sizes(44, 6144, 64), "vocab_size": 50432}, 20_554_567_680),
    # arXiv:2304.01373 table 1: 70,426,624 and 11,846,072,320
    "pythia-70m": ({**NEOX, **sizes(6, 512, 8), "vocab_size": 50304}, 70_426_624),
    "pythia-12b": ({**NEOX, **sizes(36, 5120, 40), "vocab_size": 50688}, 11_846_072_320),
    # meta-llama/Llama-2-7b-hf, Llama-2-70b-hf and Meta-Llama-3-8B on the Hugging Face hub
    "llama-2-7b": ({**LLAMA, **sizes(32, 4096, 32), "intermediate_size": 33024}, 6_738_415_616),
    "llama-2-70b": (
        {**LLAMA, **sizes(80, 8192, 64), "num_kv_heads": 8, "intermediate_size": 86016},
        68_976_648_192,
    ),
    "llama-3-8b": (
        {**LLAMA, **sizes(32, 4096, 32), "num_kv_heads": 8, "intermediate_size": 43008, "vocab_size": 128256},
        8_030_261_248,
    ),
    # mistralai/Mistral-7B-v0.1 on the Hugging Face hub
    "mistral-7b": (
        {**LLAMA, **sizes(32, 4096, 32), "num_kv_heads": 8, "intermediate_size": 43008},
        7_241_732_096,
    ),
}


def resolution(name: str, world_size: int = 1, accelerator: str = "cuda", **changes: Any) -> Resolution:
    """The resolved configuration of a published model, with changes."""
    values = {**RUN, **MODELS[name][0], **changes}
    return resolve([], values, Resources(world_size, accelerator))  # type: ignore[arg-type]
