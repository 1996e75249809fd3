"""Low-rank updates that `peft` wrote are read beside their model: with peft's logits, and exports give them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertForSequenceClassification,
    PreTrainedModel,
    T5ForConditionalGeneration,
)

from megatron.checkpoint.huggingface.import_model import adopt
from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.huggingface.peft_adapter import WEIGHTS, export_adapter
from megatron.checkpoint.load.stored_model import open_model
from megatron.config import Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_inference_engine
from megatron.errors import ConfigError, RunError
from tests.checkpoint.huggingface.models import VOCABULARY, make, save, tokens
from tools import convert_from_hf

LLAMA = "llama, grouped, biases"
TIED = "llama, wide heads, tied"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "queries and values": (LLAMA, {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]}),
    "all": (LLAMA, {"r": 3, "lora_alpha": 6, "target_modules": ALL, "lora_dropout": 0.1}),
    "one rank for the root": (LLAMA, {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["down_proj"]}),
    "ranks and factors of their own": (
        LLAMA,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"o_proj": 32},
        },
    ),
    "the first pattern that matches": (
        LLAMA,
        {
            "r": 4,
            "target_modules": ["q_proj", "o_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 6, "q_proj": 2},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 64, "q_proj": 16, "model.layers.1.self_attn.o_proj": 1},
            "init_lora_weights": "orthogonal",
        },
    ),
    "norms of rows": (LLAMA, {"r": 3, "lora_alpha": 6, "target_modules": ALL, "use_dora": True, "use_rslora": True}),
    "norms of rows of values": (LLAMA, {"r": 3, "target_modules": ["v_proj", "o_proj"], "use_dora": True}),
    "norms, turned": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "mamba": ("mamba", {"r": 4, "target_modules": ["in_proj"], "use_dora": True}),
    "mamba2": ("mamba2, tied, limits, biases", {"r": 4, "target_modules": ["in_proj"]}),
    "gated delta net": ("qwen3_next", {"r": 4, "target_modules": ["in_proj_qkvz", "in_proj_ba", "out_proj"]}),
    "experts": ("qwen3_moe", {"r": 3, "lora_alpha": 6, "target_modules": ["o_proj"], "target_parameters": FUSED}),
    "experts, in turn": (
        "gpt_oss",
        {
            "r": 4,
            "target_modules": [],
            "target_parameters": FUSED,
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {"layers.0.mlp.experts.gate_up_proj": 32},
        },
    ),
    "outputs of experts": ("mixtral", {"r": 4, "target_modules": [], "target_parameters": FUSED[1:]}),
    "a matrix by its parameter": (
        LLAMA,
        {
            "r": 4,
            "target_modules": ["q_proj"],
            "target_parameters": ["o_proj.weight"],
            "alpha_pattern": {"o_proj": 32, "q_proj": 2},
        },
    ),
    "some blocks": (LLAMA, {"r": 4, "target_modules": ["o_proj"], "layers_to_transform": [1]}),
    "turned, joint": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "joint": ("neox", {"r": 4, "lora_alpha": 2, "target_modules": ["query_key_value", "dense_h_to_4h"]}),
    "an embedding that was tied": (TIED, {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "an output layer that was tied": ("gpt2", {"r": 4, "target_modules": ["c_fc"], "modules_to_save": ["lm_head"]}),
    "two matrices that were tied": (
        TIED,
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "tied matrices": (
        TIED,
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "trained matrices": (
        LLAMA,
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
}


def write(name: str, folder: Path, **settings: Any) -> Tensor:
    """Writes the model and an adapter with random values of every matrix. Returns peft's logits."""
    save(name, folder / "theirs")
    model = get_peft_model(make(name), LoraConfig(**settings, task_type="CAUSAL_LM"))
    draws = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.2)
        logits: Tensor = model.eval()(tokens()).logits
    model.save_pretrained(folder / "adapter")
    return logits


def ours(
    folder: Path, model_size: int = 1, *, of: Tensor | None = None, adapter: str = "adapter", to: str = "ours"
) -> Tensor:
    """Imports both and returns our logits."""
    made = adopt(Folder.open(folder / "theirs"), folder / to, adapter=folder / adapter, model_size=model_size)
    keys = {**made.settings, "load": str(folder / to), "seq_length": 24, "user_script": "generate.py"}
    config = resolve([], keys, Resources(1)).config.for_inference()
    engine = build_inference_engine(config, Topology.single(), made.settings["vocab_size"])
    return engine.logits(tokens() if of is None else of)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case: str, tmp_path: Path) -> None:
    name, settings = CASES[case]
    expected = write(name, tmp_path, **settings)
    with torch.no_grad():
        assert not torch.allclose(expected, make(name)(tokens()).logits, atol=1e-2), "the adapter changes something"
    torch.testing.assert_close(ours(tmp_path, 2 if case == "all" else 1), expected, rtol=1e-4, atol=2e-5)


def write_experts_apart(folder: Path, **settings: Any) -> None:
    """Writes a Mixtral and an adapter as releases before 5 had them: with a linear layer for each matrix."""
    save("mixtral", folder / "theirs")
    model, draws = make("mixtral"), torch.Generator().manual_seed(6)
    named = {}
    for number, block in enumerate(model.model.layers):
        for expert in range(block.mlp.experts.num_experts):
            begin = f"base_model.model.model.layers.{number}.block_sparse_moe.experts.{expert}."
            for name, (inputs, outputs) in {"w1": (64, 88), "w2": (88, 64), "w3": (64, 88)}.items():
                named[f"{begin}{name}.lora_A.weight"] = torch.randn(2, inputs, generator=draws) * 0.2
                named[f"{begin}{name}.lora_B.weight"] = torch.randn(outputs, 2, generator=draws) * 0.2
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM", **settings)
    config.save_pretrained(folder / "adapter")
    save_file(named, folder / "adapter" / WEIGHTS)


def test_experts_that_were_linear_layers_are_those_that_peft_converts(tmp_path: Path) -> None:
    """Halves with an A each become one update of twice the rank, in peft too."""
    write_experts_apart(tmp_path)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(make("mixtral"), tmp_path / "adapter").eval()(tokens()).logits
        assert not torch.allclose(expected, make("mixtral")(tokens()).logits, atol=1e-2), (
            "the adapter changes something"
        )
    torch.testing.assert_close(ours(tmp_path), expected, rtol=1e-4, atol=2e-5)
    export_adapter(open_model(tmp_path / "ours" / "global_step0"), tmp_path / "back")
    with torch.no_grad():
        back = PeftModel.from_pretrained(make("mixtral"), tmp_path / "back").eval()(tokens()).logits
    torch.testing.assert_close(back, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout = 0.1: updates of experts are taken over without it alone"),
        ({"use_dora": True}, "use_dora = True: updates of experts are taken over without it alone"),
    ],
    ids=["dropout", "norms of rows"],
)
def test_what_peft_has_not_for_experts_is_refused(settings: dict[str, Any], reported: str, tmp_path: Path) -> None:
    write_experts_apart(tmp_path, **settings)
    with pytest.raises(ConfigError, match=reported):
        ours(tmp_path)


def test_updates_of_experts_of_other_shapes_are_refused(tmp_path: Path) -> None:
    """As early releases of peft wrote them, with inputs for outputs."""
    write("mixtral", tmp_path, r=2, target_modules=[], target_parameters=FUSED)
    path = tmp_path / "adapter" / WEIGHTS
    stored = load_file(path)
    begin = "base_model.model.model.layers.0.mlp.experts.base_layer."
    first, second = (stored[f"{begin}{part}.weight"] for part in ("lora_A", "lora_B"))
    swapped = {f"{begin}lora_A.weight": second.T, f"{begin}lora_B.weight": first.T}
    save_file({key: value.contiguous() for key, value in {**stored, **swapped}.items()}, path)
    reported = r"layers\.0\.mlp\.experts\.gate_up_proj have shapes \(8, 176\) and \(64, 8\), which are no \[4 r, 64\]"
    with pytest.raises(RunError, match=reported):
        ours(tmp_path)


ADDED: dict[str, tuple[str, list[str] | None]] = {
    "both": (LLAMA, ["embed_tokens", "lm_head"]),
    "one of two that were tied": (TIED, ["embed_tokens"]),
    "rows that were added and not trained": (TIED, None),
}


@pytest.mark.parametrize("case", ADDED)
def test_rows_of_added_tokens_come_with_the_adapter(case: str, tmp_path: Path) -> None:
    """As peft writes them for a model that was given rows: with what was there before beside what was trained."""
    name, saved = ADDED[case]
    save(name, tmp_path / "theirs")
    base = make(name)
    base.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    settings = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or len(parameter) == VOCABULARY + 3:
                parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.2)
        if saved != ["embed_tokens", "lm_head"]:  # old rows of the model stay
            for module in (base.get_input_embeddings(), base.get_output_embeddings()):
                weight = getattr(module, "original_module", module).weight
                weight[:VOCABULARY] = make(name).get_input_embeddings().weight
        inputs = tokens().where(tokens() > 4, tokens() % 3 + VOCABULARY)
        expected = model.eval()(inputs).logits
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert any("original_module" in key for key in load_file(tmp_path / "adapter" / WEIGHTS)) == bool(saved)
    torch.testing.assert_close(ours(tmp_path, of=inputs), expected, rtol=1e-4, atol=2e-5)
    export_adapter(open_model(tmp_path / "ours" / "global_step0"), tmp_path / "back", tokens=VOCABULARY + 3)
    again = ours(tmp_path, of=inputs, adapter="back", to="again")
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=2e-5)


def test_other_rows_of_one_matrix_are_refused(tmp_path: Path) -> None:
    write(LLAMA, tmp_path, r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    path = tmp_path / "adapter" / WEIGHTS
    stored = load_file(path)
    stored["base_model.model.model.embed_tokens.weight"] = torch.ones(VOCABULARY + 2, 64)
    save_file(stored, path)
    reported = f"there are {VOCABULARY + 2} rows of the embedding and {VOCABULARY} rows of the head.*resize_token_embed"
    with pytest.raises(RunError, match=f"(?s){reported}"):
        ours(tmp_path)
    stored["base_model.model.model.embed_tokens.modules_to_save.weight"] = torch.zeros(VOCABULARY, 64)
    save_file(stored, path)
    with pytest.raises(RunError, match=r"embed_tokens\.weight and .*modules_to_save\.weight are other matrices"):
        ours(tmp_path)


def test_absent_settings_are_those_of_peft(tmp_path: Path) -> None:
    write(LLAMA, tmp_path, r=8, target_modules=["q_proj", "v_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    needed = {"peft_type", "task_type", "target_modules", "base_model_name_or_path"}
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key in needed}))
    with torch.no_grad():
        expected = PeftModel.from_pretrained(make(LLAMA), tmp_path / "adapter").eval()(tokens()).logits
    weights = tmp_path / "adapter" / WEIGHTS  # in a file of early releases too
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    torch.testing.assert_close(ours(tmp_path), expected, rtol=1e-4, atol=2e-5)


def test_an_export_of_ours_comes_back_bit_by_bit(tmp_path: Path) -> None:
    """Queries, keys and values then share A, so the rank stays; beside a model in bfloat16 as well, in 32 bits."""
    write(LLAMA, tmp_path, **CASES["all"][1])
    ours(tmp_path)
    export_adapter(open_model(tmp_path / "ours" / "global_step0"), tmp_path / "back")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    first = load_file(tmp_path / "back" / "adapter_model.safetensors")
    for base in ("theirs", "half"):
        adopt(Folder.open(tmp_path / base), tmp_path / f"of {base}", adapter=tmp_path / "back")
        export_adapter(open_model(tmp_path / f"of {base}" / "global_step0"), tmp_path / f"again of {base}")
        second = load_file(tmp_path / f"again of {base}" / "adapter_model.safetensors")
        assert first.keys() == second.keys()
        assert all(first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first)
        settings = json.loads((tmp_path / f"again of {base}" / "adapter_config.json").read_text())
        assert settings["r"] == 9  # three of three


ONE_TOKEN = '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'


def test_the_tool_writes_the_adapter_into_the_keys(tmp_path: Path) -> None:
    """And a run goes on with it."""
    write(LLAMA, tmp_path, **CASES["queries and values"][1])
    flags = {"--input-dir": "theirs", "--output-dir": "ours", "--adapter": "adapter"}
    arguments = [word for flag, name in flags.items() for word in (flag, str(tmp_path / name))]
    (tmp_path / "adapter" / "tokenizer.json").write_text(ONE_TOKEN)
    assert convert_from_hf.main(arguments) == 0
    assert (tmp_path / "ours" / "tokenizer" / "tokenizer.json").read_text() == ONE_TOKEN, "that of the adapter"
    settings = yaml.safe_load((tmp_path / "ours" / "model.yml").read_text())
    assert settings["lora"] == {
        "rank": 8,
        "alpha": 24.0,
        "dropout": 0.0,
        "targets": ["query_key_value"],
        "modules_to_save": [],
    }


def test_another_rank_than_the_file_says_is_refused(tmp_path: Path) -> None:
    """Peft refuses such a folder too; it writes one where it adds adapters that have a rank_pattern."""
    write(LLAMA, tmp_path, **CASES["ranks and factors of their own"][1])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": {}}))
    with pytest.raises(RunError, match=r"q_proj has rank 2, and adapter_config\.json says 4"):
        ours(tmp_path)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_adapter_of_a_model_of_another_size_is_refused(part: str, tmp_path: Path) -> None:
    write(LLAMA, tmp_path, **CASES["queries and values"][1])
    path = tmp_path / "adapter" / WEIGHTS
    stored = load_file(path)
    name = f"base_model.model.model.layers.1.self_attn.v_proj.{part}.weight"
    stored[name] = torch.cat([stored[name]] * 2, int(part == "lora_A"))
    save_file(stored, path)
    with pytest.raises(
        RunError, match=r"update of model\.layers\.1\.self_attn\.v_proj is A .* B .* matrix of the model is"
    ):
        ours(tmp_path)


def test_an_adapter_of_other_experts_is_refused(tmp_path: Path) -> None:
    write_experts_apart(tmp_path)
    path = tmp_path / "adapter" / WEIGHTS
    stored = load_file(path)
    name = next(name for name in sorted(stored) if ".experts." in name and name.endswith("lora_B.weight"))
    save_file({**stored, name: stored[name][:-1].contiguous()}, path)
    with pytest.raises(RunError, match=r"the update of .*experts\.0\.w1 is A .* B .* matrix of the model is"):
        ours(tmp_path)


def test_updates_of_other_matrices_are_named(tmp_path: Path) -> None:
    write(LLAMA, tmp_path, **CASES["queries and values"][1])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = load_file(path)
    stored["base_model.model.model.layers.0.mlp.router.lora_A.weight"] = torch.ones(4, 64)
    save_file(stored, path)
    with pytest.raises(RunError, match=r"no place here: model\.layers\.0\.mlp\.router\.lora_A\.weight"):
        ours(tmp_path)
    with pytest.raises(ConfigError, match=r"it holds no adapter_config\.json with adapter_model\.safetensors"):
        adopt(Folder.open(tmp_path / "theirs"), tmp_path / "fresh", adapter=tmp_path / "theirs")


@pytest.mark.parametrize("model", [BertForSequenceClassification, T5ForConditionalGeneration])
def test_adapters_of_encoders_are_refused(model: type[PreTrainedModel], tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    own = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 32, "intermediate_size": 32}
    model(model.config_class(**sizes, **own)).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConfigError, match=r"an encoder, or an encoder and decoder, cannot be taken over.*with peft"):
        adopt(Folder.open(tmp_path / "theirs"), tmp_path / "ours", adapter=tmp_path)


def test_updates_of_shared_experts_and_dense_blocks_come_back_bit_by_bit(tmp_path: Path) -> None:
    """Peft reaches their matrices by their parameters where a model has experts."""
    save("deepseek_v3", tmp_path / "theirs")
    parts = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    shared = [name.replace("mlp.", "mlp.shared_experts.") for name in parts]
    named = [f"{name}.weight" for name in (*parts, *shared)]
    expected = write("deepseek_v3", tmp_path, r=2, lora_alpha=8, target_modules=["o_proj"], target_parameters=named)
    torch.testing.assert_close(ours(tmp_path), expected, rtol=1e-4, atol=2e-5)
    export_adapter(open_model(tmp_path / "ours" / "global_step0"), tmp_path / "back")
    with torch.no_grad():
        back = PeftModel.from_pretrained(make("deepseek_v3"), tmp_path / "back").eval()(tokens()).logits
    torch.testing.assert_close(back, expected, rtol=1e-4, atol=2e-5)
