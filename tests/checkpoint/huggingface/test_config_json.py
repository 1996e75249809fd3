"""What config.json says, leaves out or contradicts is understood as transformers does, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron.checkpoint.huggingface.config_defaults import ALIASES, DEFAULTS
from megatron.checkpoint.huggingface.export_model import export
from megatron.checkpoint.huggingface.families import FAMILIES, LATER, WITH_EXPERTS, family_for
from megatron.checkpoint.huggingface.import_model import adopt
from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.load.stored_model import open_model
from megatron.config import Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_inference_engine
from megatron.errors import ConfigError, RunError
from tests.checkpoint.huggingface.models import save, tokens
from tests.checkpoint.huggingface.random_models import answer, ours, write

VOCABULARY = 48
EXPERTS = {"hidden_size": 64, "num_attention_heads": 16, "num_hidden_layers": 1, "intermediate_size": 40}
EXPERTS |= {"moe_intermediate_size": 16}
SIZES: dict[str, dict[str, Any]] = {
    "gpt_neox": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 40},
    "llama": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 40},
    "mistral": {"hidden_size": 64, "num_attention_heads": 16, "num_hidden_layers": 1, "intermediate_size": 40},
    "mixtral": {"hidden_size": 64, "num_attention_heads": 16, "num_hidden_layers": 1, "intermediate_size": 24},
    "qwen3": {"hidden_size": 32, "num_attention_heads": 32, "num_hidden_layers": 1, "intermediate_size": 40},
    "qwen2": {"hidden_size": 64, "num_attention_heads": 32, "num_hidden_layers": 1, "intermediate_size": 40},
    "gemma2": {"hidden_size": 32, "num_attention_heads": 8, "num_hidden_layers": 2, "intermediate_size": 40},
    "gemma3_text": {"hidden_size": 32, "num_attention_heads": 8, "num_hidden_layers": 6, "intermediate_size": 40},
    "olmo2": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 40},
    "olmo3": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 40},
    "smollm3": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 40},
    "phi3": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 40},
    "cohere2": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 40},
    "granite": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 40},
    "starcoder2": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 40},
    "nemotron": {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,  # which the class does not fill in
        "num_hidden_layers": 1,
        "intermediate_size": 40,
    },
    "apertus": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 40},
    "qwen2_moe": {**EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**EXPERTS, "num_experts": 8, "num_experts_per_tok": 4},
    "qwen3_next": {**EXPERTS, "num_experts": 8, "num_experts_per_tok": 4, "num_hidden_layers": 4},
    "qwen3_5_text": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 40},
    "qwen3_5_moe_text": {**EXPERTS, "num_experts": 8, "num_experts_per_tok": 4, "num_hidden_layers": 4},
    "olmoe": {**EXPERTS, "num_experts": 8, "num_experts_per_tok": 4},
    "gpt_oss": {**EXPERTS, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 16, "num_hidden_layers": 2},
    "deepseek_v2": {**EXPERTS, "n_routed_experts": 8, "num_experts_per_tok": 3},
    "deepseek_v3": {
        **EXPERTS,
        "n_routed_experts": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,  # which the class does not fill in
    },
    "nemotron_h": {
        "hidden_size": 32,
        "num_attention_heads": 8,
        "intermediate_size": 40,
        "mamba_num_heads": 8,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 24,
    },
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 1},
    "opt": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "ffn_dim": 40},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 1},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 1},
    "mamba2": {"hidden_size": 256, "num_hidden_layers": 1, "num_heads": 8},
}
"""Sizes that keep a model small; everything else is left out."""
ROUNDING = {"deepseek_v3": 1e-4, "qwen3_next": 3e-5, "qwen3_5_text": 3e-5, "qwen3_5_moe_text": 3e-5}
"""Scores of latents of 1,536 random features reach 50, and both sides are 2e-5 to 5e-5 from float64. The norm of heads
divides values near zero by 1e-3, and both sides of Qwen3-Next are 1e-5 from float64."""


@pytest.mark.parametrize("family", SIZES)
def test_what_is_left_out_has_the_value_of_the_class(family: str, tmp_path: Path) -> None:
    """The logits are those of transformers' own reading of the same bare file; Mixtral's base is 1,000,000 there."""
    reported = {"model_type": family, "vocab_size": VOCABULARY, "pad_token_id": None, **SIZES[family]}
    expected = write(tmp_path, reported)
    assert expected is not None
    torch.testing.assert_close(ours(tmp_path), expected, rtol=1e-5, atol=ROUNDING.get(family, 1e-5))


@pytest.mark.parametrize("family", DEFAULTS)
def test_the_table_is_that_of_the_classes(family: str) -> None:
    config = AutoConfig.for_model(family)
    rope = getattr(config, "rope_parameters", None) or {}
    local, rope = rope.get("sliding_attention", {}), rope.get("full_attention", rope)  # of each kind, or of all blocks
    renamed = {"rope_theta": "rope_theta", "rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    renamed |= {"partial_rotary_factor": "partial_rotary_factor"}
    unsaid = {"qwen3": {"sliding_window", "mlp_bias"}, "mistral": {"attention_bias", "mlp_bias"}}  # not in use there
    unsaid |= {"mixtral": unsaid["mistral"], "mamba": {"time_step_rank"}, "qwen2": {"sliding_window"}}
    for key, value in DEFAULTS[family].items():
        if value is None or key in unsaid.get(family, ()):
            continue
        if key == "rope_local_base_freq":
            found = local["rope_theta"]
        else:
            found = rope[renamed[key]] if key in renamed else getattr(config, key)
        assert found == value, key
    assert type(config).attribute_map == ALIASES.get(family, {})


CHANGES_NOTHING = frozenset(
    {
        *("initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout"),
        *("transformers_version", "architectures", "output_hidden_states", "output_attentions", "return_dict", "dtype"),
        *("output_router_logits", "num_nextn_predict_layers", "num_mtp_layers"),
        *("chunk_size", "time_step_rank", "time_step_min", "time_step_max", "time_step_floor"),  # of recurrent blocks
        *("rescale_prenorm_residual", "residual_in_fp32", "use_mamba_kernels", "mamba_ssm_cache_dtype"),
        *("num_logits_to_keep", "moe_shared_expert_overlap", "mtp_layers_block_type", "num_hidden_layers"),
        *("pretraining_tp", "max_window_layers"),  # the last without windows
        *("chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type"),
    }
)
"""What of a class does not change what a model says, or only when it is trained with dropout."""


@pytest.mark.parametrize("family", [family.model_type for family in (*LATER, *WITH_EXPERTS)])
def test_no_field_of_the_class_goes_unread(family: str) -> None:
    """A further field in another release would be one that we do not understand."""
    fields = {name for name in AutoConfig.for_model(family).to_dict() if not name.startswith("_")}
    fields -= {"model_type", "rope_parameters", "original_max_position_embeddings"}
    assert sorted(fields - CHANGES_NOTHING - DEFAULTS[family].keys()) == []


@pytest.mark.parametrize("family", sorted(ALIASES.keys() - {"t5"}))
def test_other_names_of_keys_are_read(family: str, tmp_path: Path) -> None:
    names = {key: name for name, key in ALIASES[family].items()}
    sizes = SIZES[family] | ({"num_local_experts": 4} if family == "mixtral" else {})
    reported = {"model_type": family, "vocab_size": VOCABULARY, "pad_token_id": None}
    expected = write(tmp_path, reported | {names.get(key, key): value for key, value in sizes.items()})
    assert expected is not None
    torch.testing.assert_close(ours(tmp_path), expected, rtol=1e-5, atol=ROUNDING.get(family, 1e-5))


def change(folder: Path, **changes: object) -> Folder:
    path = folder / "config.json"
    reported = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in reported.items() if value != "absent"}))
    return Folder.open(folder)


LINEAR = {"rope_type": "linear", "factor": 4.0}
MIXED = ["full_attention", "sliding_attention"]
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a scaling beside another": ("llama, grouped, biases", {"rope_scaling": LINEAR}, "rope_scaling = .*contradicts"),
    "a scaling with another base": (
        "llama, grouped, biases",
        {"rope_parameters": {**LINEAR, "rope_theta": 500000}, "rope_scaling": LINEAR},
        "rope_scaling = .*contradicts rope_parameters",
    ),
    "a base beside another": (
        "llama, grouped, biases",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}, "rope_theta": 500000},
        "rope_theta = 500000: it contradicts 10000",
    ),
    "a scaling for each kind of block": (
        "llama, grouped, biases",
        {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in MIXED}},
        "rope_parameters = .*one scaling for all blocks",
    ),
    "a base that is none": (
        "llama, grouped, biases",
        {"rope_parameters": {"rope_theta": float("inf")}},
        "whole number",
    ),
    "a bound that Gemma 3 does not apply": ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50"),
    "attention to later tokens": ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = Tr"),
    "another activation": ("gemma2", {"hidden_activation": "quick_gelu"}, "hidden_activation = 'quick_gelu'"),
    "windows without a width": ("cohere2", {"sliding_window": None}, "sliding_window = None: layer_types has blocks"),
    "frequencies by the length of the text": (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8}},
        "rope_parameters = .*longrope takes other frequencies",
    ),
    "the older name of the same": ("phi3", {"rope_scaling": {"type": "su"}}, "longrope takes other frequencies"),
    "a scaling that releases read otherwise": (
        "nemotron",
        {"rope_parameters": {**LINEAR, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        "rope_scaling = .*some releases",
    ),
    "dropout of embeddings": ("phi3", {"embd_pdrop": 0.1}, "embd_pdrop = 0.1"),
    "dropout of the residual": ("starcoder2", {"residual_dropout": 0.1}, "residual_dropout = 0.1"),
    "other bounds of a gate": ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit = 5.0: only 7.0 can be taken over"),
    "a scaling that is none, or the usual one": (
        "gpt_oss",
        {"rope_parameters": None},
        "rope_parameters = None: releases of transformers take this for no scaling, or for that of the public models",
    ),
    "an activation that is not xIELU": ("apertus", {"hidden_act": "relu2"}, "hidden_act = 'relu2'"),
    "no scaling, or that of Apertus": ("apertus", {"rope_parameters": None}, "rope_parameters = None: releases of tra"),
    "a base that release 5 reads beside a scaling alone": (
        "apertus",
        {"rope_parameters": "absent", "rope_theta": 10000.0},
        "rope_theta = 10000.0: without a scaling beside it, releases of transformers take this base, or 12,000,000",
    ),
    "a base that releases read otherwise": (
        "olmo3",
        {"rope_parameters": "absent", "rope_theta": 10000.0},
        "rope_theta = 10000.0: releases of transformers give",
    ),
    "a local base beside another": ("gemma3", {"rope_local_base_freq": 5.0}, "rope_local_base_freq = 5.0: it contra"),
    "a scaling beside that of a kind": (
        "gemma3",
        {"rope_scaling": {**LINEAR, "factor": 8.0}},
        "rope_scaling = .*contra",
    ),
    "one block of positions for kinds": ("olmo3", {"rope_parameters": {"rope_theta": 1e4}}, "only a block for each of"),
    "windows where none are in use": ("smollm3", {"use_sliding_window": False}, "use_sliding_window = False"),
    "positions of too few blocks": ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers = .*less than 4"),
    "windows that are not in use": ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "no window is given"),
    "another kind of block": ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
    "kinds of too few blocks": ("qwen3", {"layer_types": ["full_attention"]}, "layer_types"),
    "kinds that Mistral does not heed": (
        "mistral with a window",
        {"layer_types": ["full_attention"] * 2},
        "layer_types",
    ),
    "quantized weights": ("neox", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config = "),
    "a null": ("neox", {"hidden_size": None}, "hidden_size = None"),
    "a text for a number": ("gpt2", {"n_layer": "2"}, "n_layer = '2'"),
    "two names that differ": ("gpt2", {"hidden_size": 32}, "hidden_size = 32: it is another name of n_embd"),
    "slopes of other numbers of heads": ("mpt", {"n_heads": 3}, "n_heads = 3"),
    "a rank of steps": ("mamba", {"time_step_rank": 7}, "time_step_rank = 7"),
    "heads of another width": ("mamba2", {"expand": 3}, "expand = 3: the heads have 128 features, and expand x hidden"),
    "bounds out of order": ("mamba2", {"time_step_limit": [0.5, 0.1]}, "the smallest step is above the largest"),
    "a bound that is none": ("mamba2", {"time_step_limit": [0.5, "x"]}, "time_step_limit = 'x': this is no bound"),
    "a wider convolution": ("mamba2", {"conv_kernel": 3}, "conv_kernel = 3: only 4 can be taken over"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_read_otherwise_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name, changes, reported = REFUSED[case]
    save(name, tmp_path)
    with pytest.raises(ConfigError, match=reported):
        change(tmp_path, **changes).settings()


SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "the same scaling twice": (
        "llama, grouped, biases",
        {"rope_parameters": {**LINEAR, "rope_theta": 10000.0}, "rope_scaling": {"type": "linear", "factor": 4}},
    ),
    "the older spelling": ("llama, grouped, biases", {"rope_parameters": "absent", "rope_theta": 500000}),
    "windows in some blocks": ("qwen3", {"layer_types": MIXED, "use_sliding_window": True, "sliding_window": 8}),
    "windows in the last blocks": (
        "qwen3",
        {"layer_types": "absent", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "the scaling of the class": ("gpt_oss", {"rope_parameters": "absent", "layer_types": "absent"}),
    "no scaling": ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}),
    "a period of windows": ("cohere2", {"layer_types": "absent", "sliding_window_pattern": 2}),
    "the older spelling of bases": (
        "gemma3",
        {
            "rope_parameters": "absent",
            "rope_theta": 10000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
    "no window for long": (
        "qwen3",
        {"layer_types": "absent", "use_sliding_window": True, "max_window_layers": "absent"},
    ),
    "a window everywhere": (
        "qwen3",
        {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": 8},
    ),
    "YaRN without the first length": (
        "llama, grouped, biases",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "weights that were unpacked": ("qwen3", {"quantization_config": {"quant_method": "gguf", "gguf_file": "a.gguf"}}),
    "steps of the usual rank": ("mamba", {"time_step_rank": "auto"}),
}


@pytest.mark.parametrize("case", SAME)
def test_what_can_be_understood_is_read_as_theirs(case: str, tmp_path: Path) -> None:
    name, changes = SAME[case]
    save(name, tmp_path)
    settings = change(tmp_path, **changes).settings()
    reported = {
        **settings,
        "vocab_size": 96,
        "make_vocab_size_divisible_by": 1,
        "load": str(tmp_path),
        "seq_length": 24,
    }
    config = resolve([], {**reported, "user_script": "generate.py"}, Resources(1)).config.for_inference()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(tokens()).logits
    found = build_inference_engine(config, Topology.single(), 96).logits(tokens())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [95, 97, 200])
def test_a_vocabulary_of_another_size_is_refused(rows: int, tmp_path: Path) -> None:
    """Rows that no tensor has would be made up, and rows left out would be lost."""
    for name in ("llama, grouped, biases", "gpt2"):
        save(name, tmp_path / name)
        with pytest.raises(ConfigError, match=f"vocab_size = {rows}: tensor .* has 96 rows"):
            adopt(change(tmp_path / name, vocab_size=rows), tmp_path / "ours")


def test_a_tied_flag_and_the_stored_head(tmp_path: Path) -> None:
    """The same matrix twice is fine; another one, or none where the flag says so, is reported by the flag's name."""
    save("neox", tmp_path / "own")
    with pytest.raises(ConfigError, match=r"tie_word_embeddings = True: the stored .* is not the embedding"):
        adopt(change(tmp_path / "own", tie_word_embeddings=True), tmp_path / "ours")
    save("llama, wide heads, tied", tmp_path / "tied")
    with pytest.raises(RunError, match=r"no tensor lm_head\.weight, and tie_word_embeddings is false"):
        adopt(change(tmp_path / "tied", tie_word_embeddings=False), tmp_path / "ours")
    weights = load_file(tmp_path / "tied" / "model.safetensors")
    twice = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(twice, tmp_path / "tied" / "model.safetensors", {"format": "pt"})
    adopt(change(tmp_path / "tied", tie_word_embeddings=True), tmp_path / "fine")


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    save("neox", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="adapter_config"):
        Folder.open(tmp_path)


@pytest.mark.parametrize("older", [False, True])
def test_the_files_are_chosen_as_transformers_chooses(older: bool, tmp_path: Path) -> None:
    """A whole file and an index of other files: what both read is the same."""
    reported = {"model_type": "llama", "vocab_size": VOCABULARY, **SIZES["llama"]}
    assert write(tmp_path, reported) is not None
    weights = load_file(tmp_path / "model.safetensors")
    stale = {key: value + 1 for key, value in weights.items()}
    if older:
        (tmp_path / "model.safetensors").unlink()
        torch.save(weights, tmp_path / "pytorch_model.bin")
        torch.save(stale, tmp_path / "part.bin")
    else:
        save_file(stale, tmp_path / "part.safetensors", {"format": "pt"})
    part, index = ("part.bin", "pytorch_model.bin") if older else ("part.safetensors", "model.safetensors")
    position = {"metadata": {}, "weight_map": dict.fromkeys(weights, part)}
    (tmp_path / f"{index}.index.json").write_text(json.dumps(position))
    torch.testing.assert_close(ours(tmp_path), answer(tmp_path), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("out", [False, True])
def test_a_value_that_a_precision_cannot_hold_is_refused(out: bool, tmp_path: Path) -> None:
    model = save("neox", tmp_path / "theirs")
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_h_to_4h.weight[3, 3] = 70000.0
    model.save_pretrained(tmp_path / "theirs")
    if out:
        adopt(Folder.open(tmp_path / "theirs"), tmp_path / "ours")
        with pytest.raises(RunError, match=r"dense_h_to_4h\.weight has values up to 70000, and 65504 is the largest"):
            export(open_model(tmp_path / "ours"), tmp_path / "back", precision="fp16")
        return
    with pytest.raises(RunError, match=r"linear1\.weight has values up to 70000, and 65504 is the largest of float16"):
        adopt(Folder.open(tmp_path / "theirs"), tmp_path / "ours", dtype=torch.float16)


def test_the_family_that_is_meant_reports_what_is_in_the_way() -> None:
    """A model with experts is no GPT-NeoX model with one error, and a Mamba model no GPT-2."""
    base = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "seq_length": 64,
        "user_script": "generate.py",
    }
    experts = {"moe_num_experts": 4, "pos_emb": "rotary", "norm": "rmsnorm", "moe_router_type": "topk"}
    config = resolve([], {**base, **experts, "moe_top_k": 2}, Resources(1)).config
    with pytest.raises(ConfigError, match=r"a (Mixtral|Qwen3-MoE) model has") as reported:
        family_for(config.model, config.moe, config.mixers)
    assert "has no experts" not in str(reported.value)
    mamba = {"attention_config": [[["mamba"], "all"]], "norm": "layernorm", "pos_emb": "none"}
    config = resolve([], {**base, **mamba}, Resources(1)).config
    with pytest.raises(ConfigError, match="a Mamba model has 'rmsnorm'"):
        family_for(config.model, config.moe, config.mixers)
    decoders = {each.model_type for each in FAMILIES.values() if not each.encoder and not each.encoder_decoder}
    assert set(SIZES) == decoders, "every decoder is in the table; others have test_bert.py and test_t5.py"
