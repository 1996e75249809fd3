"""Configurations of transformers drawn at random, and what both sides make of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.config import Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_inference_engine
from tests.checkpoint.huggingface.random_mixtures import MIXTURES
from tests.checkpoint.huggingface.random_recurrent import RECURRENT

VOCABULARY, LENGTH, POSITIONS = 48, 20, 32
Settings = dict[str, Any]


def _sizes(chance: random.Random) -> Settings:
    heads = chance.choice([1, 2, 4])
    width = chance.choice([8, 12, 16])
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * width,
        "num_attention_heads": heads,
        "num_hidden_layers": chance.choice([1, 2, 3]),
    }


def _rarely(chance: random.Random, seldom: Any, mostly: Any) -> Any:
    """What is not to be had here in one configuration of ten."""
    return seldom if chance.random() < 0.1 else mostly


def _scaling(chance: random.Random) -> Settings | None:
    kind = chance.choice(["default", "linear", "yarn", "llama3", "dynamic"])
    if kind == "default":
        return None
    block: Settings = {"rope_type": kind, "factor": chance.choice([2.0, 4, 8.0])}
    if kind == "llama3":
        block |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind in ("yarn", "llama3") and chance.random() < 0.7:
        block["original_max_position_embeddings"] = chance.choice([8, 16])
    if kind == "yarn" and chance.random() < 0.3:
        block |= {"beta_fast": 16, "beta_slow": 2}
    return block


def _rope(chance: random.Random, *, base: str, part: str | None = None) -> Settings:
    """One of the spellings of the two releases, or both of them, which may contradict each other."""
    theta = chance.choice([None, 10000, 500000.0, 1000000])
    turned = chance.choice([None, 0.25, 0.5, 1.0]) if part else None
    scaling = _scaling(chance)
    older: Settings = {} if theta is None else {base: theta}
    older |= {part: turned} if part and turned is not None else {}
    nested: Settings = {**(scaling or {"rope_type": "default"}), "rope_theta": theta or 10000}
    nested |= {} if turned is None else {"partial_rotary_factor": turned}
    spelling = chance.choice(["older", "older", "new", "new", "both", "type"])
    if spelling == "new":
        return {"rope_parameters": nested}
    if spelling == "both":
        return {**older, "rope_parameters": nested, "rope_scaling": _scaling(chance)}
    if spelling == "type" and scaling:
        scaling = {("type" if name == "rope_type" else name): value for name, value in scaling.items()}
    return older | ({} if scaling is None else {"rope_scaling": scaling})


def _kinds(chance: random.Random, layers: int) -> list[str]:
    kinds = ("full_attention", "sliding_attention")
    return [chance.choice(kinds)] * layers if chance.random() < 0.6 else [chance.choice(kinds) for _ in range(layers)]


def _neox(chance: random.Random) -> Settings:
    sizes = _sizes(chance)
    return sizes | {
        "intermediate_size": chance.choice([24, 40]),
        "hidden_act": chance.choice(["gelu", "gelu_new", "gelu_fast", "relu", "silu", "mish"]),
        "use_parallel_residual": chance.random() < 0.5,
        "attention_bias": chance.random() < 0.7,
        "tie_word_embeddings": chance.random() < 0.4,
        "max_position_embeddings": POSITIONS,
        **_rope(chance, base="rotary_emb_base", part="rotary_pct"),
    }


def _llama(chance: random.Random) -> Settings:
    sizes = _sizes(chance)
    heads = sizes["num_attention_heads"]
    found = sizes | {
        "intermediate_size": chance.choice([24, 40]),
        "hidden_act": chance.choice(["silu", "silu", "gelu", "relu"]),
        "num_key_value_heads": chance.choice([heads, 1]),
        "attention_bias": chance.random() < 0.3,
        "mlp_bias": chance.random() < 0.3,
        "tie_word_embeddings": chance.random() < 0.4,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": chance.choice([1e-5, 1e-6]),
        **_rope(chance, base="rope_theta"),
    }
    return found | ({"head_dim": chance.choice([8, 16, 24])} if chance.random() < 0.5 else {})


def _mistral(chance: random.Random) -> Settings:
    found = {**_llama(chance), "attention_bias": False, "mlp_bias": False}
    found["sliding_window"] = chance.choice([None, 4, 8, 1000])
    if chance.random() < 0.3:
        found["layer_types"] = _kinds(chance, found["num_hidden_layers"])
    return found


def _mixtral(chance: random.Random) -> Settings:
    return _mistral(chance) | {"num_local_experts": chance.choice([2, 4]), "num_experts_per_tok": _rarely(chance, 1, 2)}


def _qwen3(chance: random.Random) -> Settings:
    found = {**_llama(chance), "mlp_bias": False, "head_dim": chance.choice([8, 16, 24])}
    layers = found["num_hidden_layers"]
    found |= {"use_sliding_window": chance.random() < 0.6, "sliding_window": chance.choice([None, 4, 8, 1000])}
    if chance.random() < 0.5:
        found["max_window_layers"] = chance.choice([0, 1, layers])
    if chance.random() < 0.4:
        found["layer_types"] = _kinds(chance, layers)
    return found


def _qwen2(chance: random.Random) -> Settings:
    found = _qwen3(chance)
    del found["attention_bias"], found["mlp_bias"]
    return found


def _typed_rope(chance: random.Random, *, local: str | None) -> Settings:
    """Positions by the kind of block, in either spelling, both alike or contradicting each other."""
    full = chance.choice([None, 10000.0, 500000.0, 500000.0, 500000.0])  # what all releases give OLMo 3 alike
    sliding = chance.choice([None, 100.0, 10000.0])
    scaling = chance.choice([None, {"rope_type": "linear", "factor": 4.0}, _scaling(chance)])
    older: Settings = {} if full is None else {"rope_theta": full}
    older |= {local: sliding} if local and sliding else {}
    older |= {} if scaling is None else {"rope_scaling": scaling}
    blocks: Settings = {"full_attention": {"rope_type": "default", **(scaling or {})}}
    blocks["sliding_attention"] = {"rope_type": "default"}
    if full is not None:
        blocks["full_attention"]["rope_theta"] = full
    if sliding is not None:
        blocks["sliding_attention"]["rope_theta"] = sliding
    spelling = chance.choice(["older", "older", "new", "both"])
    return older if spelling == "older" else {"rope_parameters": blocks} | (older if spelling == "both" else {})


def _gemma2(chance: random.Random) -> Settings:
    found = _llama(chance)
    del found["hidden_act"], found["mlp_bias"]
    found |= {
        "head_dim": chance.choice([8, 16]),
        "hidden_activation": chance.choice(["gelu_pytorch_tanh", "gelu_pytorch_tanh", "gelu", "silu"]),
        "query_pre_attn_scalar": chance.choice([7, 16]),
        "sliding_window": chance.choice([4, 8, 1000]),
        "attn_logit_softcapping": chance.choice([None, 2.0, 50.0]),
        "final_logit_softcapping": chance.choice([None, 3.0, 30.0]),
        "use_bidirectional_attention": _rarely(chance, True, None),
    }
    return found | ({"layer_types": _kinds(chance, found["num_hidden_layers"])} if chance.random() < 0.5 else {})


def _gemma3(chance: random.Random) -> Settings:
    found = {name: value for name, value in _gemma2(chance).items() if not name.startswith("rope")}
    found["attn_logit_softcapping"] = _rarely(chance, 2.0, None)
    if "layer_types" not in found and chance.random() < 0.5:
        found["sliding_window_pattern"] = chance.choice([2, 3])
    return found | _typed_rope(chance, local="rope_local_base_freq")


def _olmo2(chance: random.Random) -> Settings:
    found = _llama(chance)
    del found["mlp_bias"]
    return found


def _olmo3(chance: random.Random) -> Settings:
    found = {name: value for name, value in _olmo2(chance).items() if not name.startswith("rope")}
    found["sliding_window"] = chance.choice([4, 8, 1000])
    found |= {"layer_types": _kinds(chance, found["num_hidden_layers"])} if chance.random() < 0.5 else {}
    return found | _typed_rope(chance, local=None)


def _smollm3(chance: random.Random) -> Settings:
    found = _llama(chance)
    layers = found["num_hidden_layers"]
    found |= {"use_sliding_window": chance.random() < 0.5, "sliding_window": chance.choice([None, 4, 8])}
    found["pad_token_id"] = None
    found["no_rope_layer_interval"] = chance.choice([2, 3, 4])
    if chance.random() < 0.4:
        found["no_rope_layers"] = [chance.choice([0, 1]) for _ in range(layers)]
    return found | ({"layer_types": _kinds(chance, layers)} if chance.random() < 0.4 else {})


def _phi3(chance: random.Random) -> Settings:
    found = _llama(chance)
    del found["attention_bias"], found["mlp_bias"]
    found.pop("head_dim", None)
    block = found.get("rope_parameters") or found.get("rope_scaling")
    if block and _rarely(chance, False, True):
        for name in ("rope_parameters", "rope_scaling"):
            found.pop(name, None)
    found |= {"sliding_window": chance.choice([None, None, 4, 8]), "pad_token_id": None}
    return found | {"partial_rotary_factor": chance.choice([0.5, 1.0]), "embd_pdrop": _rarely(chance, 0.1, 0.0)}


def _cohere2(chance: random.Random) -> Settings:
    found = _llama(chance)
    del found["rms_norm_eps"], found["mlp_bias"]
    found.pop("head_dim", None)
    found |= {"layer_norm_eps": chance.choice([1e-5, 1e-3]), "logit_scale": chance.choice([0.0625, 0.3, 1.0])}
    found["sliding_window"] = chance.choice([4, 8, 1000])
    choice = chance.choice(["pattern", "types", "neither"])
    if choice == "pattern":
        found["sliding_window_pattern"] = chance.choice([2, 3])
    return found | ({"layer_types": _kinds(chance, found["num_hidden_layers"])} if choice == "types" else {})


def _granite(chance: random.Random) -> Settings:
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    return _llama(chance) | {name: chance.choice([1.0, 0.22, 3, 12.0]) for name in names}


def _starcoder2(chance: random.Random) -> Settings:
    found = _llama(chance)
    del found["rms_norm_eps"], found["attention_bias"], found["mlp_bias"]
    found |= {"hidden_act": chance.choice(["gelu_pytorch_tanh", "gelu", "relu"]), "use_bias": chance.random() < 0.6}
    return found | {"sliding_window": chance.choice([None, 4, 8]), "norm_epsilon": chance.choice([1e-5, 1e-3])}


def _nemotron(chance: random.Random) -> Settings:
    found = _llama(chance)
    del found["rms_norm_eps"]
    found["hidden_act"] = chance.choice(["relu2", "gelu", "silu"])
    if chance.random() < 0.5:  # a scaling of its positions is refused
        for name in ("rope_parameters", "rope_scaling"):
            found.pop(name, None)
    return found | {"partial_rotary_factor": 0.5} if chance.random() < 0.5 else found


def _apertus(chance: random.Random) -> Settings:
    found = {name: value for name, value in _llama(chance).items() if name not in ("mlp_bias", "head_dim")}
    return found | {"hidden_act": "xielu"}


def _gpt2(chance: random.Random) -> Settings:
    sizes = _sizes(chance)
    found = {
        "vocab_size": VOCABULARY,
        "n_embd": sizes["hidden_size"],
        "n_head": sizes["num_attention_heads"],
        "n_layer": sizes["num_hidden_layers"],
        "n_positions": POSITIONS,
        "activation_function": chance.choice(["gelu", "gelu_new", "relu", "silu"]),
        "tie_word_embeddings": chance.random() < 0.6,
        "scale_attn_by_inverse_layer_idx": chance.random() < 0.2,
        "scale_attn_weights": chance.random() < 0.85,
    }
    return found | ({"n_inner": 40} if chance.random() < 0.4 else {})


def _opt(chance: random.Random) -> Settings:
    sizes = _sizes(chance)
    return sizes | {
        "ffn_dim": chance.choice([24, 40]),
        "word_embed_proj_dim": sizes["hidden_size"] if chance.random() < 0.85 else 8,
        "max_position_embeddings": POSITIONS,
        "activation_function": chance.choice(["relu", "gelu", "silu"]),
        "enable_bias": chance.random() < 0.6,
        "do_layer_norm_before": chance.random() < 0.85,
        "layer_norm_elementwise_affine": chance.random() < 0.85,
        "tie_word_embeddings": chance.random() < 0.6,
    }


def _mpt(chance: random.Random) -> Settings:
    heads = chance.choice([1, 2, 3, 4])
    attention = {"alibi": True, "clip_qkv": _rarely(chance, 0.1, None)}
    attention |= {"softmax_scale": _rarely(chance, 0.5, None), "alibi_bias_max": _rarely(chance, 4, 8)}
    return {
        "vocab_size": VOCABULARY,
        "d_model": heads * 8,
        "n_heads": heads,
        "n_layers": chance.choice([1, 2]),
        "max_seq_len": POSITIONS,
        "attn_config": attention,
        "tie_word_embeddings": chance.random() < 0.6,
        "pad_token_id": None,
    }


def _with_experts(draw: Callable[[random.Random, Settings], Settings], chance: random.Random) -> Settings:
    return draw(chance, _llama(chance))


DRAWN: dict[str, Callable[[random.Random], Settings]] = {
    "gpt_neox": _neox,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen3": _qwen3,
    "qwen2": _qwen2,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "smollm3": _smollm3,
    "phi3": _phi3,
    "cohere2": _cohere2,
    "granite": _granite,
    "starcoder2": _starcoder2,
    "nemotron": _nemotron,
    "apertus": _apertus,
    **{name: partial(_with_experts, draw) for name, draw in MIXTURES.items()},
    "gpt2": _gpt2,
    "opt": _opt,
    "mpt": _mpt,
    **RECURRENT,
}
"""model_type -> draws a config.json."""


def tokens() -> torch.Tensor:
    """Token ids [2, LENGTH]."""
    return torch.randint(2, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def write(folder: Path, settings: Settings) -> torch.Tensor | None:
    """Writes the folder of a model with that config.json; returns the logits of transformers, None if it refuses."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(5)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        model.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(settings))
        return answer(folder)
    except Exception:
        return None


def attention_of(folder: Path) -> dict[str, str]:
    """The option under which every release computes the model: the default of 4.57.6 has no bounds of scores."""
    bounded = json.loads((folder / "config.json").read_text()).get("attn_logit_softcapping") is not None
    return {"attn_implementation": "eager"} if bounded else {}


def answer(folder: Path) -> torch.Tensor:
    """What transformers says of the folder."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **attention_of(folder)).eval()(tokens()).logits


def ours(folder: Path) -> torch.Tensor:
    """What we say of it. Raises ConfigError or RunError where we refuse it."""
    settings = Folder.open(folder).settings() | {"vocab_size": VOCABULARY, "make_vocab_size_divisible_by": 1}
    settings = {**settings, "load": str(folder), "seq_length": LENGTH, "user_script": "generate.py"}
    config = resolve([], settings, Resources(1)).config.for_inference()
    return build_inference_engine(config, Topology.single(), VOCABULARY).logits(tokens())
