"""Logits and gradients equal those of transformers' GPT-NeoX and Llama on the same random weights.

A wrong QKV row order, rotary pairing, gate order, residual form, norm epsilon, tied head or grouped head breaks these.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron.distributed.mesh import Topology
from megatron.model.sequential_model import SequentialModel
from megatron.objectives.language_model import LanguageModel
from tests.model.sections import LLAMA, VOCABULARY, build, disturb

SEQUENCE = 40


def neox_names(layers: int) -> dict[str, str]:
    """Our name -> transformers' name; the tensors are the same."""
    names = {
        "0.word_embeddings.weight": "gpt_neox.embed_in.weight",
        f"{layers + 3}.norm.weight": "gpt_neox.final_layer_norm.weight",
        f"{layers + 3}.norm.bias": "gpt_neox.final_layer_norm.bias",
    }
    same = ("input_layernorm", "post_attention_layernorm", "attention.query_key_value", "attention.dense")
    pairs = {name: name for name in same} | {"mlp.linear1": "mlp.dense_h_to_4h", "mlp.linear2": "mlp.dense_4h_to_h"}
    for block in range(layers):
        for ours, theirs in pairs.items():
            for kind in ("weight", "bias"):
                names[f"{block + 2}.{ours}.{kind}"] = f"gpt_neox.layers.{block}.{theirs}.{kind}"
    return names


def copy_neox(ours: SequentialModel, theirs: nn.Module, *, tied: bool) -> None:
    source = dict(theirs.named_parameters())
    target = {name.removeprefix("sequential."): parameter for name, parameter in ours.named_parameters()}
    names = neox_names(2)
    if not tied:
        names["6.final_linear.weight"] = next(name for name in ("lm_head.weight", "embed_out.weight") if name in source)
    assert set(names) == set(target)
    with torch.no_grad():
        for name, other in names.items():
            target[name].copy_(source[other])


def llama_tensors(theirs: LlamaForCausalLM, heads: int, kv_heads: int, *, tied: bool) -> dict[str, Tensor]:
    """Transformers' Llama weights under our names, put together as the public layout says."""
    source = theirs.state_dict()
    layers = theirs.config.num_hidden_layers
    table = {
        "0.word_embeddings.weight": source["model.embed_tokens.weight"],
        f"{layers + 3}.norm.scale": source["model.norm.weight"],
    }
    for block in range(layers):
        prefix = f"model.layers.{block}."
        q, k, v = (source[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv")
        if heads == kv_heads:  # head by head [q, k, v]
            by_head = [matrix.view(heads, -1, matrix.shape[1]) for matrix in (q, k, v)]
            qkv = torch.stack(by_head, dim=1).flatten(0, 2)
        else:
            qkv = torch.cat((q, k, v))
        layer = f"{block + 2}."
        table[f"{layer}attention.query_key_value.weight"] = qkv
        table[f"{layer}attention.dense.weight"] = source[f"{prefix}self_attn.o_proj.weight"]
        up, gate = source[f"{prefix}mlp.up_proj.weight"], source[f"{prefix}mlp.gate_proj.weight"]
        table[f"{layer}mlp.linear1.weight"] = torch.cat((up, gate))
        table[f"{layer}mlp.linear2.weight"] = source[f"{prefix}mlp.down_proj.weight"]
        table[f"{layer}input_layernorm.scale"] = source[f"{prefix}input_layernorm.weight"]
        table[f"{layer}post_attention_layernorm.scale"] = source[f"{prefix}post_attention_layernorm.weight"]
    if not tied:
        table[f"{layers + 4}.final_linear.weight"] = source["lm_head.weight"]
    return table


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, SEQUENCE), generator=torch.Generator().manual_seed(3))


def neox(tied: bool, parallel: bool, heads: int, rotary_pct: float, activation: str) -> GPTNeoXForCausalLM:
    torch.manual_seed(11)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=176,
        hidden_act=activation,
        rotary_pct=rotary_pct,
        max_position_embeddings=64,
        layer_norm_eps=1e-5,
        use_parallel_residual=parallel,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    model = GPTNeoXForCausalLM(config).eval()
    disturb(model)
    return model


NEOX_CASES = [
    (False, True, 4, 0.25, "gelu"),
    (False, False, 4, 1.0, "gelu"),
    (True, True, 8, 0.5, "relu"),
]


@pytest.mark.parametrize(("tied", "parallel", "heads", "rotary_pct", "activation"), NEOX_CASES)
def test_logits_and_gradients_equal_gpt_neox(
    tied: bool, parallel: bool, heads: int, rotary_pct: float, activation: str
) -> None:
    theirs = neox(tied, parallel, heads, rotary_pct, activation)
    ours = build(
        num_attention_heads=heads,
        num_kv_heads=heads,
        kv_channels=64 // heads,
        rotary_pct=rotary_pct,
        gpt_j_residual=parallel,
        no_weight_tying=not tied,
        activation=activation,
    )
    copy_neox(ours, theirs, tied=tied)
    ids = tokens()
    expected, actual = theirs(ids).logits, ours(ids)
    torch.testing.assert_close(actual.transpose(0, 1), expected, rtol=1e-5, atol=1e-5)

    labels, mask = ids.roll(-1, 1), torch.ones(ids.shape)
    mask[:, -1] = 0
    LanguageModel().loss(actual, labels, mask, Topology.single().model, tokens=mask.sum()).backward()
    F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, other in neox_names(2).items():
        grad = ours.get_parameter(f"sequential.{name}").grad
        torch.testing.assert_close(
            grad, gradients[other], rtol=1e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def llama(heads: int, kv_heads: int, *, tied: bool, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(12)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    disturb(model)
    return model


@pytest.mark.parametrize(("heads", "kv_heads", "tied"), [(4, 4, False), (4, 2, False), (4, 1, True)])
def test_logits_equal_llama(heads: int, kv_heads: int, tied: bool) -> None:
    theirs = llama(heads, kv_heads, tied=tied)
    ours = build(num_attention_heads=heads, num_kv_heads=kv_heads, no_weight_tying=not tied, **LLAMA)
    table = llama_tensors(theirs, heads, kv_heads, tied=tied)
    ours.sequential.load_state_dict(table)
    ids = tokens()
    torch.testing.assert_close(ours(ids).transpose(0, 1), theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_one_norm_for_both_is_two_equal_norms() -> None:
    """gpt_j_tied equals transformers' parallel residual when its two norms hold the same values."""
    theirs = neox(False, True, 4, 0.25, "gelu")
    with torch.no_grad():
        for layer in theirs.gpt_neox.layers:
            layer.post_attention_layernorm.load_state_dict(layer.input_layernorm.state_dict())
    ours = build(gpt_j_residual=True, gpt_j_tied=True)
    source = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            name = name.removeprefix("sequential.")
            other = neox_names(2).get(name) or next(n for n in ("lm_head.weight", "embed_out.weight") if n in source)
            parameter.copy_(source[other])
    ids = tokens()
    torch.testing.assert_close(ours(ids).transpose(0, 1), theirs(ids).logits, rtol=1e-5, atol=1e-5)
