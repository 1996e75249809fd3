"""How an imported generation_config.json chooses tokens, beside the logits processors of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from megatron.checkpoint.huggingface.generation_config import sampling
from megatron.inference.sampling import Sampling, distribution, penalised

MODEL = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=8, n_layer=1, n_head=1, n_positions=8))


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 0},
        {"top_k": 7, "top_p": 0.4},
        {"top_p": 1.0},
        {"top_p": 0.0},
        {"top_p": 0.0, "top_k": 9, "temperature": 2.0},
        {"min_p": 0.2},
        {"min_p": 0.0, "top_p": 0.9},
        {"repetition_penalty": 1.7, "top_p": 0.0},
    ],
    ids=str,
)
def test_tokens_are_as_likely_as_in_transformers(said):
    settings = GenerationConfig(do_sample=True, **{"temperature": 1.0, "top_k": 50, "top_p": 1.0, **said})
    seen = torch.tensor([[3, 8, 8]])
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(4)) * 2
    processors = MODEL._get_logits_processor(settings, input_ids_seq_length=3, device="cpu")
    theirs = processors(seen, logits.clone())[0].softmax(0)
    ours = Sampling(**sampling({"do_sample": True, **said}))
    assert not ours.greedy
    found = distribution(penalised(logits[0], seen[0].tolist(), ours.repetition_penalty), ours)
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-7)


def test_a_temperature_of_0_takes_the_likeliest_token():
    """Transformers refuses to sample at it."""
    settings = GenerationConfig(do_sample=True, temperature=0.0)
    with pytest.raises(ValueError, match="temperature"):
        MODEL._get_logits_processor(settings, input_ids_seq_length=3, device="cpu")
    assert Sampling(**sampling({"do_sample": True, "temperature": 0.0, "top_p": 0.5})).greedy
