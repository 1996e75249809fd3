"""Small models of blocks without attention, for tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from megatron.distributed.mesh import Topology
from megatron.model.kv_cache import KVCache
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.sequential_model import SequentialModel
from megatron.param_table import ModelDims, recurrent_state_shapes
from tests.model.sections import VOCABULARY, initialization_section, model_section

POSITIONS = 32


def sections(kind: str, blocks: int = 2, **changes: object) -> tuple[Any, Any]:
    """The model and the mixers section of blocks of one kind."""
    model = model_section(num_layers=blocks, attention_config=(kind,) * blocks, pos_emb="none", mlp_width=128)
    model.seq_length, model.intermediate_size, model.expansion_factor = POSITIONS, None, None
    model.lora = changes.pop("lora", None)
    values = {
        "mamba_use_bias_in_conv": True,
        "mamba_use_bias_in_linears": False,
        "dim_att": None,
        "head_size": None,
        "ffn_dim": None,
        "gmlp_attn_dim": 16,
        "mamba_num_heads": None,
        "mamba_head_dim": 16,
        "mamba_state_dim": 12,
        "mamba_num_groups": 2,
        "mamba_dt_limit": (0.01, 0.2),
        "mamba_norm_before_gate": False,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_conv_kernel_dim": 4,
    }
    return model, SimpleNamespace(**{**values, **changes})


def dims(kind: str, **changes: object) -> ModelDims:
    model, mixers = sections(kind, **changes)
    return ModelDims.of(model, None, mixers)


def build(
    kind: str,
    topology: Topology | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    reset: bool = False,
    blocks: int = 2,
    **changes: object,
) -> SequentialModel:
    """A model of blocks of one kind; reset: states at each document."""
    model, mixers = sections(kind, blocks, **changes)
    plan = build_layer_specs(
        ModelSpec(
            model,
            initialization_section(init_method_std=0.1),
            SimpleNamespace(),
            padded_vocab_size=VOCABULARY,
            topology=topology or Topology.single(),
            seed=1,
            dtype=dtype,
            device=torch.device("cpu"),
            mixers=mixers,
            reset_attention=reset,
        )
    )
    return SequentialModel(plan)


def cache(kind: str, rows: int, *, model_size: int = 1) -> KVCache:
    """An empty cache of a model of two such blocks."""
    states = {
        block: recurrent_state_shapes(dims(kind), block, model_size=model_size, max_length=POSITIONS)
        for block in range(2)
    }
    return KVCache(0, rows, 4, POSITIONS, 16, states=states)


def disturb(model: torch.nn.Module) -> None:
    """Gives every parameter that starts from a constant or almost nothing a value of its own, so that none can hide."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Drawn whole and cut like the parameter, so that every layout gets the same values.
            if any(part in name for part in ("_w1", "_w2", "proj.weight", "time_", "A_log", "D", "norm", "ln")):
                scale = 0.3 if "sgu.proj" in name or "_w" in name else 0.1
                parameter += scale * torch.randn(parameter.shape, generator=generator)
