"""Keys of blocks without attention that have an effect only where there are such blocks."""

from __future__ import annotations

from megatron.config.config import Config
from megatron.config.validation.dependent_model_keys import DependentKeys
from megatron.registry import GATED_DELTA_NET


def has_kind(config: Config, *kinds: str) -> bool:
    """Returns whether some block is of one of the kinds, or the kinds are not known yet."""
    pattern = set(map(str, config.model.attention_config or ()))
    return not pattern or bool(pattern & set(kinds))


def _of(kinds: tuple[str, ...], *keys: str) -> DependentKeys:
    def condition(config: Config) -> bool:
        return has_kind(config, *kinds)

    return DependentKeys(keys, condition, f"no block is of kind {' or '.join(kinds)}")


OF_MIXERS: tuple[DependentKeys, ...] = (
    _of(("mamba",), "mamba_selective_scan_fusion"),
    _of(
        ("mamba", "mamba2"),
        *("mamba_use_bias_in_conv", "mamba_use_bias_in_linears"),
        *("mamba_causal_conv_fusion", "mamba_inner_func_fusion"),
    ),
    _of(
        ("mamba2",),
        *("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups"),
        *("mamba_dt_limit", "mamba_norm_before_gate"),
    ),
    _of(
        (GATED_DELTA_NET,),
        *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
        *("linear_conv_kernel_dim", "gated_delta_fusion"),
    ),
    _of(("amlp",), "gmlp_attn_dim"),
    _of(("rwkv",), "dim_att", "head_size", "ffn_dim"),
)
