"""Value residual is Llama's with hooks on its projections of values, forward, backward and token by token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from megatron.model.kv_cache import KVCache
from megatron.model.sequential_model import SequentialModel
from megatron.model.value_residual import ValueResidual
from tests.model.sections import LLAMA, build
from tests.model.test_against_transformers import llama, llama_tensors, tokens

BLOCKS, HEADS, KEY_HEADS = 4, 4, 2
FACTORS = torch.tensor([[0.7, 0.4], [1.3, -0.6], [0.2, 0.9]])
"""Of the own values and of the first block's, in each block after the first."""


def theirs(factors: Tensor) -> LlamaForCausalLM:
    """Llama whose blocks after the first mix their values with those of the first. factors: [blocks - 1, 2]."""
    model = llama(HEADS, KEY_HEADS, tied=True, layers=BLOCKS).double()
    first: list[Tensor] = []

    def record(module: torch.nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        first[:] = [out]

    projections = [layer.self_attn.v_proj for layer in model.model.layers]
    projections[0].register_forward_hook(record)
    for projection, (own, shared) in zip(projections[1:], factors, strict=True):
        projection.register_forward_hook(lambda module, args, out, a=own, b=shared: a * out + b * first[0])
    return model


def ours_with(other: LlamaForCausalLM, **keys: object) -> SequentialModel:
    model = build(
        num_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_kv_heads=KEY_HEADS,
        value_residual=True,
        no_weight_tying=False,
        **LLAMA,
        **keys,
    )
    table = llama_tensors(other, HEADS, KEY_HEADS, tied=True)
    table |= {f"{block + 3}.attention.value_residual.factors": pair for block, pair in enumerate(FACTORS)}
    model.sequential.load_state_dict(table)
    return model


def test_logits_and_gradients_are_those_of_llama_with_hooks() -> None:
    factors = FACTORS.double().requires_grad_()
    other = theirs(factors)
    ours = ours_with(other)
    found, expected = ours(tokens()).transpose(0, 1), other(tokens()).logits.float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(expected)
    found.backward(direction)
    expected.backward(direction)
    own = dict(ours.sequential.named_parameters())
    mixed = torch.stack([own[f"{block}.attention.value_residual.factors"].grad for block in range(3, BLOCKS + 2)])
    torch.testing.assert_close(mixed, factors.grad.float(), rtol=1e-4, atol=1e-4)
    gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    for block in range(BLOCKS):
        rows = own[f"{block + 2}.attention.query_key_value.weight"].grad[-KEY_HEADS * 16 :]
        theirs_rows = gradients[f"model.layers.{block}.self_attn.v_proj.weight"]
        torch.testing.assert_close(rows, theirs_rows.float(), rtol=1e-4, atol=1e-4)
    embedding = gradients["model.embed_tokens.weight"]
    torch.testing.assert_close(own["0.word_embeddings.weight"].grad, embedding.float(), rtol=1e-4, atol=1e-4)


def test_no_values_stay_in_the_blocks() -> None:
    ours = ours_with(theirs(FACTORS.double()))
    ours(tokens())
    assert all(module.first is None for module in ours.modules() if isinstance(module, ValueResidual))


def test_cached_tokens_have_the_logits_of_the_full_sequence() -> None:
    ours = ours_with(theirs(FACTORS.double())).eval()
    ids = tokens()[:, :12]
    cache = KVCache(BLOCKS, len(ids), KEY_HEADS, 12, 16, dtype=torch.float32)
    with torch.inference_mode():
        expected = ours(ids)
        parts = [ours(part, cache) for part in (ids[:, :5], *ids[:, 5:].split(1, dim=1))]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-5)
