"""The assembled model: its tensors against the shape table, its cache, its initial values, its options."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron.distributed.param_attrs import is_sharded, is_tied, no_weight_decay, shard_dim
from megatron.model.kv_cache import KVCache
from megatron.model.sequential_model import SequentialModel
from megatron.param_table import ModelDims, tensors
from tests.model.sections import LLAMA, VOCABULARY, build, disturb, model_section

OPTIONS = [
    {},
    {"no_weight_tying": False, "pos_emb": "learned"},
    {"gpt_j_residual": True, "use_bias_in_mlp": False, "use_bias_in_norms": False},
    {"gpt_j_residual": True, "gpt_j_tied": True, "use_bias_in_attn_linear": False, "pos_emb": "none"},
    {**LLAMA, "num_kv_heads": 2},
    {**LLAMA, "num_kv_heads": 1, "kv_channels": 24, "no_weight_tying": False},
]
ADDED = [
    {"lora": {"rank": 3, "targets": "all"}},
    {**LLAMA, "num_kv_heads": 2, "gpt_j_residual": True, "lora": {"rank": 3, "targets": ["dense", "linear1"]}},
    {"soft_prompt_tuning": {"num_tokens": 3}, "pos_emb": "learned", "no_weight_tying": False},
]
"""What is trained beside a frozen model."""


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", OPTIONS + ADDED)
def test_parameters_agree_with_the_shape_table(options: dict[str, object]) -> None:
    model = build(**options)
    table = {f"sequential.{t.layer}.{t.name}": t for t in tensors(ModelDims.of(model_section(**options)), VOCABULARY)}
    parameters = dict(model.named_parameters())
    assert {name: tuple(p.shape) for name, p in parameters.items()} == {n: t.shape for n, t in table.items()}
    for name, parameter in parameters.items():
        assert shard_dim(parameter) == table[name].shard_dim, name
        assert no_weight_decay(parameter) == (table[name].kind in ("norm", "bias")), name
        tied = name.endswith("0.word_embeddings.weight") and not model_section(**options).no_weight_tying
        assert is_tied(parameter) == (tied or name.endswith("attention.rpe.weight")), name
    assert any(is_sharded(parameter) for parameter in parameters.values())


@pytest.mark.parametrize("options", OPTIONS)
def test_every_parameter_receives_a_gradient(options: dict[str, object]) -> None:
    """Nothing is dropped on the way, such as the attention output of a parallel residual without MLP bias."""
    model = build(std=0.1, **options)
    disturb(model)
    model(ids(2, 24)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("options", OPTIONS + ADDED)
def test_cached_logits_equal_uncached(options: dict[str, object]) -> None:
    """A prompt, a chunk of several tokens, then single tokens; then another prompt in the same, reset cache."""
    model = build(std=0.1, **options).eval()
    disturb(model)
    section = model_section(**options)
    cache = KVCache(section.num_layers, 2, section.num_kv_heads, 32, section.kv_channels)
    for seed, chunks in ((0, (7, 5, 1, 1, 1)), (1, (3, 1, 9))):
        tokens = ids(2, sum(chunks), seed)
        with torch.no_grad():
            full = model(tokens)
            cache.reset()
            ends = list(itertools.accumulate(chunks))
            parts = [model(tokens[:, end - part : end], cache) for part, end in zip(chunks, ends, strict=True)]
        torch.testing.assert_close(torch.cat(parts), full, rtol=1e-5, atol=1e-5)
        assert cache.length == sum(chunks)


def test_a_full_cache_is_an_error() -> None:
    model = build()
    cache = KVCache(2, 1, 4, 8, 16)
    with torch.no_grad(), pytest.raises(IndexError, match="9 positions do not fit a cache of 8"):
        model(ids(1, 9), cache)


def test_a_position_past_the_learned_ones_is_an_error() -> None:
    with pytest.raises(IndexError, match="position 64 is past the 64 learned positions"):
        build(pos_emb="learned")(ids(1, 65))


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model = build(std=0.1)
    tokens, changed = ids(2, 20), ids(2, 20)
    changed[:, 12:] = ids(2, 8, seed=9)
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:12], after[:12], rtol=0, atol=0)
    assert not torch.allclose(before[12:], after[12:])


def test_the_seed_decides_the_weights_and_only_the_seed() -> None:
    first, torch_state = build(seed=1).state_dict(), torch.get_rng_state()
    torch.manual_seed(99)
    second, other = build(seed=1).state_dict(), build(seed=2).state_dict()
    torch.set_rng_state(torch_state)
    weights = [name for name, value in first.items() if value.dim() == 2]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in weights)
    assert len({first[name].flatten()[0].item() for name in weights}) == len(weights)


def test_dropout_acts_in_training_only() -> None:
    model = build(std=0.1, hidden_dropout=0.3, attention_dropout=0.3, gpt_j_residual=True)
    tokens = ids(2, 16)
    torch.manual_seed(0)
    first, second = model(tokens), model(tokens)
    assert not torch.allclose(first, second)
    torch.manual_seed(0)
    torch.testing.assert_close(model(tokens), first, rtol=0, atol=0)
    model.eval()
    torch.testing.assert_close(model(tokens), build(std=0.1, gpt_j_residual=True)(tokens), rtol=1e-5, atol=1e-6)


def test_bf16_follows_fp32() -> None:
    """bf16 keeps 8 bits; over two layers logits of deviation about 1 stay within a few hundredths on average."""
    wide, narrow = build(std=0.1), build(std=0.1, dtype=torch.bfloat16)
    tokens = ids(2, 48)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    difference = (narrow(tokens).float() - wide(tokens)).abs().mean()
    assert difference < 0.02 * wide(tokens).std()


def test_tied_models_hold_one_matrix() -> None:
    model: SequentialModel = build(no_weight_tying=False)
    assert [name for name in model.state_dict() if name.endswith("final_linear.weight")] == []
    assert sum(tensor.numel() == VOCABULARY * 64 for tensor in model.state_dict().values()) == 1
