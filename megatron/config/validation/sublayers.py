"""Rules for blocks of one sublayer: attention alone, and an MLP alone."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.errors import ConfigIssue
from megatron.registry import ATTENTION_ALONE, MLP_ALONE


def one_sublayer_is_alone(config: Config) -> Iterator[ConfigIssue]:
    """What is about attention and MLP of one block has no place in a block of one of them."""
    found = {ATTENTION_ALONE, MLP_ALONE} & set(map(str, config.model.attention_config or ()))
    kinds = " and ".join(sorted(found))
    layers = config.transformer_engine.layers
    reasons = {
        "gpt_j_residual": (config.model.gpt_j_residual, "nothing in it could be parallel"),
        "norm_placement": (config.model.norm_placement != "pre", "it has one norm, before attention or MLP"),
        "use_mup": (config.mup.use_mup, "the depth of the model is counted in pairs of attention and MLP"),
        "compile": (config.kernels.compile, "blocks are compiled with attention and MLP"),
    }
    if layers:
        reasons[layers[0]] = (True, "Transformer Engine's layers are put into blocks with both")
    for key, (applies, why) in reasons.items():
        if found and applies:
            what = f"a block of kind {kinds} has one sublayer: {why}"
            yield ConfigIssue(what, key=key, value=config.flat()[key], hint=f"leave {key} out, or use other kinds")
