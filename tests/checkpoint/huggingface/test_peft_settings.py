"""adapter_config.json of `peft`: its defaults, the pattern that counts, and what is refused by name."""

import json
from typing import Any

import pytest
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from megatron.checkpoint.huggingface.peft_settings import CONFIG, PeftSettings
from megatron.errors import ConfigError


def read(tmp_path, **settings: Any) -> PeftSettings:
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    return PeftSettings.read(tmp_path)


@pytest.mark.parametrize("given", [{}, {"r": 4}, {"lora_alpha": 3}, {"r": 4, "lora_alpha": 3, "use_rslora": True}])
def test_absent_settings_are_those_of_peft(tmp_path, given):
    found, theirs = read(tmp_path, peft_type="LORA", **given), LoraConfig(**given)
    assert (found.rank, found.alpha, found.rank_stabilized) == (theirs.r, theirs.lora_alpha, theirs.use_rslora)
    assert (found.magnitudes, found.dropout, found.ties) == (False, theirs.lora_dropout, False)
    written = PeftSettings.read(theirs.save_pretrained(tmp_path / "whole") or tmp_path / "whole")
    assert written == found


ALPHAS = {"layers.0.self_attn.q_proj": 64, "q_proj": 16, "^model.*v_proj": 4, r".*\\.v_proj": 2, "_proj": 1}


@pytest.mark.parametrize("module", ["q_proj", "v_proj", "k_proj", "in_proj"])
@pytest.mark.parametrize("layer", [0, 1, 10])
def test_the_first_pattern_that_matches_counts(tmp_path, module, layer):
    name = f"model.layers.{layer}.self_attn.{module}"
    expected = ALPHAS.get(get_pattern_key(ALPHAS, name), 8)
    assert read(tmp_path, alpha_pattern=ALPHAS).factor(name, 4) == expected / 4


STARTS = ("pissa", "pissa_niter_4", "OLoRA", "corda", "loftq", "lora_ga", "a later one")
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_qalora": True}, "use_qalora = True: only False can be taken over"),
    ({"bias": "all"}, "bias = 'all': only 'none' can be taken over"),
    ({"peft_type": "IA3"}, "peft_type = 'IA3': only 'LORA' can be taken over"),
    ({"r": 0}, "r = 0: the rank must be at least 1"),
    ({"r": None}, "r = None: the rank must be at least 1"),
    ({"lora_alpha": None}, "lora_alpha = None: this must be a number above 0"),
    ({"alpha_pattern": {"(": 3}}, "alpha_pattern = .*: this must be a regular expression and a number"),
    ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication = .* only None can be taken over"),
    ({"kasa_config": {"beta": 1e-4}}, "kasa_config = .* only None can be taken over"),
    *(
        ({"init_lora_weights": start}, f"init_lora_weights = '{start}': with it peft .*_conversion=")
        for start in STARTS
    ),
]


@pytest.mark.parametrize(("settings", "reported"), REFUSED, ids=str)
def test_other_updates_are_refused_by_name(tmp_path, settings, reported):
    with pytest.raises(ConfigError, match=f"(?s){reported}"):
        read(tmp_path, **settings)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "mica", "Gaussian"])
def test_starts_beside_the_weights_as_they_are_are_taken_over(tmp_path, start):
    assert read(tmp_path, init_lora_weights=start).rank == 8
