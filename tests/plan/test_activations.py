"""The estimate of activations against what autograd keeps, counted by its own hooks.

Tolerance: 20 % for a block, since kernels may keep a little more or less; the estimate rests on reading them.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.config import Config, Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.engine.freeze import freeze
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.sequential_model import SequentialModel
from megatron.objectives.language_model import LanguageModel
from megatron.param_table import ModelDims, tensors
from megatron.plan.activation_layout import ActivationLayout
from megatron.plan.memory import block_activations, head_activations

VOCABULARY, LENGTH, BATCH = 512, 64, 2

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "seq_length": LENGTH,
    "train_micro_batch_size_per_gpu": BATCH,
    "train_iters": 10,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
}
NEOX = {"pos_emb": "rotary", "rotary_pct": 0.25, "gpt_j_residual": True, "no_weight_tying": True}
LLAMA = {"pos_emb": "rotary", "norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "use_bias_in_mlp": False}
EXPERTS = {"moe_num_experts": 4, "moe_top_k": 2, "moe_router_type": "topk"}
SHARED = {
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 96,
    "moe_shared_expert_gate": True,
    "moe_router_score_function": "sigmoid",
}
LATENTS = {
    **{key: value for key, value in LLAMA.items() if key != "num_kv_heads"},
    "multi_latent_attention": True,
    "kv_lora_rank": 32,
    "qk_head_dim": 32,
    "qk_pos_emb_head_dim": 16,
    "v_head_dim": 32,
}
DELTA = {
    "attention_config": [[["gated_delta_net"], "all"]],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 48,
}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "gpt": {},
    "neox": NEOX,
    "llama": LLAMA,
    "dropout": DROPOUT,
    "scalenorm, sinusoidal": {"norm": "scalenorm", "pos_emb": "sinusoidal"},
    "non-parametric norm, alibi": {"norm": "non_parametric_layernorm", "pos_emb": "alibi"},
    "head norms": {**NEOX, "use_qk_layernorm": True},
    "head norms, rmsnorm": {**LLAMA, "use_qk_layernorm": True},
    "relative positions": {"pos_emb": "rpe"},
    "experts": EXPERTS,
    "gated experts": {**LLAMA, **EXPERTS},
    "shared experts": {**LLAMA, **EXPERTS, **SHARED},
    **{kind: {"attention_config": [[[kind], "all"]]} for kind in ("mamba", "rwkv", "gmlp", "amlp")},
    "mamba2": {"attention_config": [[["mamba2"], "all"]], "mamba_num_groups": 2, "mamba_state_dim": 48},
    "gated delta net": {"norm": "rmsnorm", "activation": "swiglu", "pos_emb": "none", **DELTA},
    "gated delta net, grouped values, experts": {**EXPERTS, **DELTA, "linear_num_value_heads": 4, "pos_emb": "none"},
    "attention alone": {**LLAMA, "attention_config": [[["attention"], "all"]]},
    "MLPs alone": {"attention_config": [[["mlp"], "all"]], "pos_emb": "none", "activation": "squared_relu"},
    "experts alone": {**EXPERTS, **SHARED, "attention_config": [[["mlp"], "all"]], "pos_emb": "none"},
    "updates of attention alone": {**NEOX, "gpt_j_residual": False, "attention_config": [[["attention"], "all"]]}
    | {"lora": {"rank": 8, "targets": ["query_key_value", "dense"]}},
    "updates": {"lora": {"rank": 8}},
    "updates of all, neox": {**NEOX, "lora": {"rank": 8, "targets": "all"}},
    "latents": LATENTS,
    "latents of queries, wide values": {**LATENTS, "q_lora_rank": 48, "v_head_dim": 48},
    "latents, dropout": {**LATENTS, **DROPOUT},
    "sinks": {**LLAMA, "softmax_type": "learnable", "sliding_window_width": 32},
    "value residual": {**LLAMA, "value_residual": True},
    "value residual, dropout": {**DROPOUT, "value_residual": True},
    "value residual, updates": {**LLAMA, "value_residual": True, "lora": {"rank": 8, "targets": "all"}},
    "output gate": {**LLAMA, "attention_output_gate": True},
    "output gate, updates": {**LLAMA, "attention_output_gate": True, "lora": {"rank": 8, "targets": "all"}},
    "bounded gates": {**LLAMA, "activation": "quick_geglu", "activation_func_clamp_value": 7.0},
    "dropped updates": {**NEOX, "gpt_j_tied": True, "lora": {"rank": 8, "targets": "all", "dropout": 0.1}},
    "updates, llama": {**LLAMA, "lora": {"rank": 8, "targets": ["dense", "dense_4h_to_h"]}},
    "updates, experts": {**EXPERTS, "lora": {"rank": 8, "targets": ["query_key_value"]}},
    "updates of experts": {**LLAMA, **EXPERTS, **SHARED, "lora": {"rank": 8, "targets": ["dense", "experts"]}},
    "updates of shared experts": {
        **EXPERTS,
        **SHARED,
        "lora": {"rank": 8, "targets": ["query_key_value", "shared_experts"]},
    },
    "updates of shared experts' outputs": {
        **LLAMA,
        **EXPERTS,
        **SHARED,
        "lora": {"rank": 8, "dropout": 0.1, "targets": ["dense", "shared_4h_to_h"]},
    },
    "norms of shared experts": {
        **EXPERTS,
        **SHARED,
        "lora": {"rank": 8, "dora": True, "targets": ["query_key_value", "shared_experts"]},
    },
    "updates of experts' outputs": {**EXPERTS, "lora": {"rank": 8, "targets": ["experts_4h_to_h"]}},
    "updates, mamba": {
        "attention_config": [[["mamba"], "all"]],
        "pos_emb": "none",
        "lora": {"rank": 8, "targets": "all"},
    },
    "updates, mamba2, dropped": {
        "attention_config": [[["mamba2"], "all"]],
        "mamba_num_groups": 2,
        "lora": {"rank": 8, "targets": "in_proj", "dropout": 0.1, "dora": True},
    },
    "updates, rwkv": {"attention_config": [[["rwkv"], "all"]], "lora": {"rank": 8, "targets": "all"}},
    "updates, rwkv, time": {"attention_config": [[["rwkv"], "all"]], "lora": {"rank": 8, "targets": "time_mixing"}},
    "updates, gmlp": {"attention_config": [[["gmlp"], "all"]], "lora": {"rank": 8, "targets": "all"}},
    "updates, dropped, amlp": {
        "attention_config": [[["amlp"], "all"]],
        "lora": {"rank": 8, "targets": "gmlp", "dropout": 0.1, "dora": True},
    },
    "updates, gated delta net": {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "pos_emb": "none",
        **DELTA,
        "lora": {"rank": 8, "targets": ["in_proj", "dense"]},
    },
    "norms of rows": {**NEOX, "lora": {"rank": 8, "targets": "all", "dora": True}},
    "norms of rows, dropped": {**LLAMA, "lora": {"rank": 8, "targets": "all", "dora": True, "dropout": 0.1}},
    "prompt": {"soft_prompt_tuning": {"num_tokens": 8}},
    "prompt, llama": {**LLAMA, "soft_prompt_tuning": {"num_tokens": 8}},
}


def saved_bytes(config: Config, dtype: torch.dtype) -> int:
    """Bytes of the storages that autograd keeps of one forward pass, parameters apart."""
    from megatron.engine.deepspeed_engine import keyed_parameters  # imports DeepSpeed

    topology = Topology.single()
    plan = build_layer_specs(
        ModelSpec(
            config.model,
            config.initialization,
            config.kernels,
            padded_vocab_size=VOCABULARY,
            topology=topology,
            seed=1,
            dtype=dtype,
            device=torch.device("cpu"),
            moe=config.moe,
            mixers=config.mixers,
        )
    )
    model = SequentialModel(plan)
    freeze(keyed_parameters(model), tensors(ModelDims.of(config.model, config.moe, config.mixers), VOCABULARY))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    retained: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            retained[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mask = torch.ones(tokens.shape)
        LanguageModel().loss(model(tokens), tokens, mask, topology.model, tokens=mask.sum())
    return sum(storage.nbytes() for storage in retained.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bfloat16"])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_activations(changes: dict[str, Any], dtype: torch.dtype) -> None:
    config = resolve([], {**BASE, **changes}, Resources(1)).config
    layout = ActivationLayout(
        seq_length=LENGTH,
        micro_batch=BATCH,
        model_parallel_size=1,
        width=dtype.itemsize,
        recompute=0,
        hidden_dropout=config.model.hidden_dropout > 0,
        attention_dropout=config.model.attention_dropout > 0,
        cpu=True,
        loss_in_blocks=False,
    )
    dims = ModelDims.of(config.model, config.moe, config.mixers)
    one = saved_bytes(
        config.replace(num_layers=1, attention_config=tuple(config.model.attention_config or ())[:1]), dtype
    )
    two = saved_bytes(config, dtype)
    assert block_activations(dims, layout, int(dims.value_residual)) == pytest.approx(two - one, rel=0.2)
    logits = BATCH * LENGTH * VOCABULARY * dtype.itemsize  # the loss keeps them outside of autograd's hooks
    rest = head_activations(dims, layout, VOCABULARY) - logits
    if not (dims.frozen or dims.value_residual):  # else the first block keeps less than the others
        assert 0.9 * rest <= one - (two - one) <= 2 * rest


def test_a_loss_in_blocks_has_the_logits_of_one_block() -> None:
    """2,048 tokens of 131,072 logits: blocks of 512, the gradients of the hidden states and, in fp32, of the matrix."""
    config = resolve([], BASE, Resources(1)).config
    dims = ModelDims.of(config.model, config.moe, config.mixers)
    layout = ActivationLayout(2048, 1, 1, 2, 0, hidden_dropout=False, attention_dropout=False, cpu=True)
    at_once = head_activations(dims, replace(layout, loss_in_blocks=False), 131_072)
    in_blocks = head_activations(dims, layout, 131_072)
    hidden, matrix = 2048 * dims.hidden_size * 2, 131_072 * dims.hidden_size * 4
    assert in_blocks - at_once == 512 * 131_072 * 2 + hidden + matrix - 2048 * 131_072 * 2
