"""Models of transformers become ours and go back without changing a bit; both say the same at every layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron.checkpoint.huggingface.export_model import export
from megatron.checkpoint.huggingface.families import FAMILIES, family_for
from megatron.checkpoint.huggingface.import_model import adopt
from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.load.stored_model import open_model
from megatron.config import Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_inference_engine
from megatron.errors import ConfigError, RunError
from tests.checkpoint.huggingface.models import MODELS, make, save, tokens
from tests.multi_rank import run_distributed


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def logits_of(topology: Topology, load: Path, settings: dict[str, Any], **layout: int) -> torch.Tensor:
    reported = {**settings, "load": str(load), "seq_length": 24, "user_script": "generate.py", **layout}
    config = resolve([], reported, Resources(topology.world_size)).config.for_inference()
    return build_inference_engine(config, topology, settings["vocab_size"]).logits(tokens())


def rank_logits(
    rank: int, world_size: int, pipe: int, model: int, loads: list[tuple[Path, dict[str, Any]]]
) -> list[torch.Tensor]:
    topology = Topology.build(pipe=max(1, pipe), model=model, rank=rank, world_size=world_size)
    layout = {"pipe_parallel_size": pipe, "model_parallel_size": model}
    found = [logits_of(topology, load, settings, **layout) for load, settings in loads]
    return found if rank == 0 else []


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("model_size", "pipe_size"), [(1, 0), (2, 2)])
def test_there_and_back_changes_no_bit(name: str, model_size: int, pipe_size: int, tmp_path: Path) -> None:
    save(name, tmp_path / "theirs")
    adopt(Folder.open(tmp_path / "theirs"), tmp_path / "ours", model_size=model_size, pipe_size=pipe_size)
    family = Folder.open(tmp_path / "theirs").family.name
    export(open_model(tmp_path / "ours"), tmp_path / "back", family_name=family)
    before, after = make(name).state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert before.keys() == after.keys()
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
    again = tmp_path / "again"
    adopt(Folder.open(tmp_path / "back"), again, model_size=model_size, pipe_size=pipe_size)
    for path in (tmp_path / "ours" / "global_step0").glob("*.pt"):
        assert path.read_bytes() == (again / "global_step0" / path.name).read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_theirs(name: str, tmp_path: Path) -> None:
    """One rank, read from the folder itself and from our checkpoint; what we give away answers alike too."""
    theirs = save(name, tmp_path / "theirs")
    made = adopt(Folder.open(tmp_path / "theirs"), tmp_path / "ours")
    with torch.no_grad():
        expected = theirs(tokens()).logits
    for load in (tmp_path / "ours", tmp_path / "theirs"):
        torch.testing.assert_close(logits_of(Topology.single(), load, made.settings), expected, rtol=1e-5, atol=1e-5)
    export(open_model(tmp_path / "ours"), tmp_path / "back")
    with torch.no_grad():
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()(tokens()).logits
    torch.testing.assert_close(back, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("pipe", "model"), [(0, 2), (2, 1), (2, 2)])
def test_logits_are_theirs_on_several_ranks(pipe: int, model: int, tmp_path: Path) -> None:
    expected, loads = [], []
    names = ("neox", "neox, one residual, tied", "llama, grouped, biases", "mistral", "mixtral", "mamba", "gpt2", "opt")
    for name in names:
        theirs = save(name, tmp_path / name / "theirs")
        folder = Folder.open(tmp_path / name / "theirs")
        made = adopt(folder, tmp_path / name / "ours", model_size=model, pipe_size=pipe)
        loads.append((tmp_path / name / "ours", made.settings))
        with torch.no_grad():
            expected.append(theirs(tokens()).logits)
    answers = run_distributed(rank_logits, max(1, pipe) * model, pipe, model, loads)[0]
    for found, target in zip(answers, expected, strict=True):
        torch.testing.assert_close(found, target, rtol=1e-5, atol=1e-5)


def test_several_files_with_an_index(tmp_path: Path) -> None:
    theirs = save("llama, grouped, biases", tmp_path / "theirs", max_shard_size="60KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    adopt(Folder.open(tmp_path / "theirs"), tmp_path / "ours")
    export(open_model(tmp_path / "ours"), tmp_path / "back", largest_file=60_000)
    names = set(json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(names) > 2
    assert all((tmp_path / "back" / name).stat().st_size < 70_000 for name in names)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(value, back[key]) for key, value in theirs.state_dict().items())


def test_the_older_format_is_read(tmp_path: Path) -> None:
    theirs = save("gpt2", tmp_path / "theirs")
    bare = {key.removeprefix("transformer."): value for key, value in theirs.transformer.state_dict().items()}
    torch.save({**bare, "h.0.attn.bias": torch.ones(1, 1, 64, 64)}, tmp_path / "theirs" / "pytorch_model.bin")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    adopt(Folder.open(tmp_path / "theirs"), tmp_path / "ours")
    export(open_model(tmp_path / "ours"), tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(value, back[key]) for key, value in theirs.state_dict().items())


def change(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "reported"),
    [
        ("neox", {"model_type": "bloom"}, "model_type = 'bloom'"),
        ("neox", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
        ("llama, as many kv heads", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_scaling"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim = 32"),
    ],
)
def test_settings_without_a_position_are_refused(
    name: str, changes: dict[str, object], reported: str, tmp_path: Path
) -> None:
    save(name, tmp_path / "theirs")
    with pytest.raises(ConfigError, match=reported):
        adopt(Folder.open(change(tmp_path / "theirs", **changes)), tmp_path / "ours")
    assert not list(tmp_path.glob("ours/global_step*"))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save("llama, as many kv heads", tmp_path / "theirs")
    with pytest.raises(RunError, match=r"no place for: model\.layers\.1\.input_layernorm"):
        adopt(Folder.open(change(tmp_path / "theirs", num_hidden_layers=1)), tmp_path / "ours")
    with pytest.raises(RunError, match=r"there is no tensor model\.layers\.2\.input_layernorm\.weight"):
        adopt(Folder.open(change(tmp_path / "theirs", num_hidden_layers=3)), tmp_path / "ours")
    other = Folder.open(change(tmp_path / "theirs", num_hidden_layers=2, intermediate_size=80))
    with pytest.raises(RunError, match=r"linear1\.weight has shape \[176, 64\], config\.json asks for \[160, 64\]"):
        adopt(other, tmp_path / "ours")


def reshaped(folder: Path, name: str, values: torch.Tensor) -> Folder:
    stored = weights_of(folder)
    (path,) = folder.glob("*.safetensors")
    save_file({**stored, name: values.contiguous()}, path)
    return Folder.open(folder)


@pytest.mark.parametrize(
    ("tensor", "reported"),
    [
        (
            "self_attn.o_proj",
            r"tensor 2\.attention\.dense\.weight has shape \[40, 64\], config\.json asks for \[64, 64\]",
        ),
        ("mlp.up_proj", r"linear1\.weight has shape"),
        ("mlp.down_proj", r"linear2\.weight has shape \[40, "),
        ("input_layernorm", r"input_layernorm\.scale has shape \[40\], config\.json asks for \[64\]"),
    ],
)
def test_tensors_with_too_few_rows_are_named(tensor: str, reported: str, tmp_path: Path) -> None:
    save("llama, grouped, biases", tmp_path / "theirs")
    name = f"model.layers.0.{tensor}.weight"
    cut = weights_of(tmp_path / "theirs")[name][:40]
    with pytest.raises(RunError, match=reported):
        adopt(reshaped(tmp_path / "theirs", name, cut), tmp_path / "ours")
    assert not list(tmp_path.glob("ours/global_step*"))


@pytest.mark.parametrize(
    ("model", "tensor", "values"),
    [
        ("llama, grouped, biases", "self_attn.k_proj", torch.zeros(64, 32)),
        ("llama, as many kv heads", "self_attn.k_proj", torch.zeros(32, 64)),
        ("llama, grouped, biases", "input_layernorm", torch.tensor(1.0)),
    ],
)
def test_tensors_that_do_not_fit_together_are_named(
    model: str, tensor: str, values: torch.Tensor, tmp_path: Path
) -> None:
    save(model, tmp_path / "theirs")
    name = f"model.layers.0.{tensor}.weight"
    shape = re.escape(str(list(values.shape)))
    with pytest.raises(RunError, match=rf"{tensor}.* {shape}"):
        adopt(reshaped(tmp_path / "theirs", name, values), tmp_path / "ours")


@pytest.mark.parametrize("name", ["llama, grouped, biases", "neox", "qwen3"])
@pytest.mark.parametrize("value", [False, None])
def test_attention_to_later_tokens_is_refused(name: str, value: object, tmp_path: Path) -> None:
    save(name, tmp_path / "theirs")
    with pytest.raises(ConfigError, match=rf"is_causal = {value}: transformers attends to later tokens"):
        Folder.open(change(tmp_path / "theirs", is_causal=value))
    Folder.open(change(tmp_path / "theirs", is_causal=True))


NEOX = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 64, "pos_emb": "rotary"}


@pytest.mark.parametrize(
    ("family", "settings", "reported"),
    [
        ("neox", {"num_kv_heads": 2}, "num_kv_heads = 2"),
        ("neox", {"use_bias_in_mlp": False}, "use_bias_in_mlp = False"),
        ("neox", {"pos_emb": "learned"}, "pos_emb = 'learned'"),
        ("neox", {"activation": "softsign"}, "activation = 'softsign'"),
        ("llama", {}, "norm = 'layernorm'"),
        ("llama", {"norm": "rmsnorm", "activation": "swiglu", "gpt_j_residual": True}, "gpt_j_residual = True"),
        ("mistral", {"norm": "rmsnorm", "activation": "swiglu"}, "use_bias_in_attn_linear = True"),
        ("gpt2", {}, "pos_emb = 'rotary'"),
        ("gpt2", {"pos_emb": "learned", "opt_pos_emb_offset": 2}, "opt_pos_emb_offset = 2"),
        ("opt", {"pos_emb": "learned"}, "opt_pos_emb_offset = 0"),
    ],
)
def test_keys_that_a_family_cannot_express_are_named(family: str, settings: dict[str, Any], reported: str) -> None:
    config = resolve([], {**NEOX, **settings, "user_script": "generate.py"}).config
    assert reported in str(ConfigError(*FAMILIES[family].misfits(config.model)))


PARTS: dict[str, Any] = {
    "norm_placement": "sandwich",
    "softmax_scale": 0.2,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 5.0,
    "scale_embeddings": True,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logit_scale": 2.0,
    "layer_types": ["a", "a"],
    "add_qkv_bias": False,
}


@pytest.mark.parametrize("key", PARTS)
def test_no_family_leaves_a_part_out(key: str) -> None:
    """GPT-NeoX, LLaMA and the like would be other models without it."""
    keys = {**NEOX, key: PARTS[key], "user_script": "generate.py", "layer_type_options": {"a": {}}}
    config = resolve([], keys).config
    for family in ("neox", "llama", "mistral", "gpt2"):
        with pytest.raises(ConfigError, match=rf"{key} = "):
            family_for(config.model, config.moe, config.mixers, family)


def test_one_norm_is_written_twice_and_read_once(tmp_path: Path) -> None:
    """gpt_j_tied is a GPT-NeoX model whose two norms are equal."""
    model = save("neox", tmp_path / "theirs")
    folder = Folder.open(tmp_path / "theirs")
    with torch.no_grad():
        for layer in model.gpt_neox.layers:
            layer.post_attention_layernorm.load_state_dict(layer.input_layernorm.state_dict())
    model.save_pretrained(tmp_path / "equal")
    adopt(Folder.open(tmp_path / "equal"), tmp_path / "ours", further={"gpt_j_tied": True})
    export(open_model(tmp_path / "ours"), tmp_path / "back")
    before, after = weights_of(tmp_path / "equal"), AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    with torch.no_grad():
        assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())
    assert len(before) == len(weights_of(tmp_path / "back"))
    with pytest.raises(RunError, match="differ"):
        adopt(folder, tmp_path / "unequal", further={"gpt_j_tied": True})
