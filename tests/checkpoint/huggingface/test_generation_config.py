"""How an imported generation_config.json chooses tokens, beside the logits processors of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from megatron.checkpoint.huggingface.generation_config import generation_of, sampling, unheeded
from megatron.errors import ConfigError
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


QUIET = {
    "use_cache": False,
    "cache_implementation": "static",
    "output_scores": True,
    "return_dict_in_generate": True,
    "num_assistant_tokens": 5,
    "prompt_lookup_num_tokens": 3,
    "disable_compile": True,
    "remove_invalid_values": True,
    "length_penalty": 0.3,
    "early_stopping": True,
    "diversity_penalty": 0.5,
    "num_return_sequences": 2,
    "max_new_tokens": 7,
    "max_length": 20,
    "top_k": 9,
    "eos_token_id": [0, 2],
    "transformers_version": "5.23.0",
}
NAMED = {
    "max_length": 20,
    "min_length": 3,
    "max_time": 2.0,
    "exponential_decay_length_penalty": [3, 1.1],
    "penalty_alpha": 0.6,
    "renormalize_logits": True,
    "watermarking_config": {"bias": 2.5},
    "token_healing": True,
    "dola_layers": "high",
    "encoder_repetition_penalty": 1.3,
    "encoder_no_repeat_ngram_size": 2,
    "no_repeat_ngram_size": 2,
    "forced_eos_token_id": 0,
    "a_setting_of_a_later_release": 0.5,
}


def test_every_setting_that_is_set_is_applied_harmless_or_named():
    assert unheeded(QUIET) == []
    assert unheeded(NAMED) == sorted(f"{name} = {value!r}" for name, value in NAMED.items())
    of_beams = {"num_beams": 4, "length_penalty": 0.3, "diversity_penalty": 0.5, "num_return_sequences": 2}
    assert unheeded(of_beams) == sorted(f"{name} = {value!r}" for name, value in of_beams.items())
    assert unheeded({"max_length": None, "watermarking_config": {}, "bad_words_ids": [], "anything_else": False}) == []


def test_the_defaults_of_transformers_are_not_named():
    """And each setting that it has is known here."""
    defaults = {**GenerationConfig().to_dict(), **GenerationConfig._get_default_generation_params()}
    assert unheeded({name: value for name, value in defaults.items() if name != "max_length"}) == []
    assert {"renormalize_logits", "guidance_scale", "assistant_early_exit"} <= defaults.keys()
    known = {name for name in defaults if unheeded({name: 0.3, "num_beams": 2}) == ["num_beams = 2"]}
    assert known.isdisjoint(NAMED.keys() - {"max_length"})


def test_config_json_alone_says_nothing_but_generation(tmp_path):
    config = {"hidden_size": 8, "model_type": "llama", "min_length": 3, "do_sample": True, "eos_token_id": 2}
    said = generation_of(tmp_path, config)
    assert said == {"min_length": 3, "do_sample": True, "eos_token_id": 2}
    assert unheeded(said) == ["min_length = 3"]


def test_a_file_that_is_no_object_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"generation_config\.json: this is no object"):
        generation_of(tmp_path, {})
