"""Files of weights: each tensor keeps its precision on the way out, and damage on the way in names file and hint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModelForCausalLM

from megatron.checkpoint.huggingface.export_model import export
from megatron.checkpoint.huggingface.import_model import adopt
from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.load.stored_model import open_model
from megatron.errors import ConfigError, RunError
from tests.checkpoint.huggingface.models import MODELS
from tests.checkpoint.huggingface.tokenized import write_model
from tools import convert_from_hf


def test_each_tensor_keeps_its_precision(tmp_path: Path) -> None:
    """As transformers saves a model of several, and reads it."""
    write_model(tmp_path / "theirs", 96)
    path = tmp_path / "theirs" / "model.safetensors"
    mixed = {name: tensor if "norm" in name else tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}
    for norm in (name for name in mixed if "norm" in name):
        mixed[norm] = mixed[norm] + 1e-4
    save_file(mixed, path, {"format": "pt"})
    adopt(Folder.open(tmp_path / "theirs"), tmp_path / "ours")
    stored = open_model(tmp_path / "ours")
    export(stored, tmp_path / "back")
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert written.keys() == mixed.keys()
    assert all(written[name].dtype == mixed[name].dtype and written[name].equal(mixed[name]) for name in mixed)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    export(stored, tmp_path / "one", precision="bf16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "one" / "model.safetensors").values()} == {torch.bfloat16}


def _sharded(folder: Path) -> tuple[Path, Path]:
    write_model(folder, 96)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder / "model-00002-of-00002.safetensors", index


def _old(folder: Path) -> Path:
    write_model(folder, 96)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def _damage(harm: str, folder: Path) -> Path:
    """The file that is to be named."""
    if harm.startswith("bin"):
        file = _old(folder)
        file.write_bytes(file.read_bytes()[:5000] if harm == "bin cut" else b"")
        return file
    shard, index = _sharded(folder)
    if harm == "absent":
        shard.unlink()
    elif harm == "index":
        index.write_text('{"metadata": {}}')
        return index
    else:
        full = shard.read_bytes()
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        shard.write_bytes({"cut": full[:-4], "header": full[:40], "empty": b"", "pointer": pointer}[harm])
    return shard


@pytest.mark.parametrize("harm", ["absent", "cut", "header", "empty", "pointer", "index", "bin cut", "bin empty"])
def test_a_file_of_weights_that_is_missing_or_cut_is_named(
    harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = _damage(harm, tmp_path / "theirs")
    given = ["--input-dir", str(tmp_path / "theirs"), "--output-dir", str(tmp_path / "ours")]
    capsys.readouterr()
    assert convert_from_hf.main(given) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"{named}: ")
    assert "fetch the file again" in said[0]
    assert ("is not there, which model.safetensors.index.json names" in said[0]) == (harm == "absent")
    assert ("git-lfs keeps the file elsewhere" in said[0]) == (harm == "pointer")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("copies", ["other values", "another dtype", "equal", "equal, with NaN", "no weights"])
def test_a_tensor_in_two_files_must_be_the_same_in_both(form: str, copies: str, tmp_path: Path) -> None:
    """The index says which file has it; transformers reads the last one all the same."""
    shard, index = _sharded(tmp_path)
    first = shard.with_name("model-00001-of-00002.safetensors")
    parts = {file: load_file(file) for file in (first, shard)}
    name = "model.layers.0.mlp.down_proj.weight"
    owner = next(file for file, tensors in parts.items() if name in tensors)
    other = next(file for file in parts if file != owner)
    if copies == "equal, with NaN":
        parts[owner][name][0, 0] = float("nan")
    stale = parts[owner][name].clone()
    if copies == "no weights":
        name, stale = "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)
        parts[owner][name] = torch.zeros(4)
    parts[other][name] = {"other values": stale + 1, "another dtype": stale.double()}.get(copies, stale)
    names = {file: file.name for file in parts}
    for file, tensors in parts.items():
        if form == "bin":
            names[file] = file.name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            torch.save(tensors, file.with_name(names[file]))
            file.unlink()
        else:
            save_file(tensors, file, {"format": "pt"})
    if form == "bin":
        listed = json.loads(index.read_text())["weight_map"]
        listed = {each: names[tmp_path / file] for each, file in listed.items()}
        index.unlink()
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))
    if copies in ("other values", "another dtype"):
        with pytest.raises(RunError, match=rf"tensor {name} is in {names[first]} and in {names[shard]}, with other"):
            Folder.open(tmp_path)
    else:
        adopt(Folder.open(tmp_path), tmp_path / "ours")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_of_a_wrapper_are_reported(prefix: str, tmp_path: Path) -> None:
    """What torch.compile, DDP, DeepSpeed and peft put before every name."""
    write_model(tmp_path, 96)
    path = tmp_path / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(RunError, match=rf"its tensors are called {prefix}model\..*take {prefix} off the names"):
        adopt(Folder.open(tmp_path), tmp_path / "ours")


def test_files_without_their_index_are_reported(tmp_path: Path) -> None:
    _sharded(tmp_path)[0].parent.joinpath("model.safetensors.index.json").unlink()
    with pytest.raises(
        ConfigError, match=r"model\.safetensors\.index\.json, which lists them, is missing; fetch the file"
    ):
        Folder.open(tmp_path)


def test_an_adapter_alone_is_reported(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"an adapter of peft, and not the model.*merge_and_unload"):
        Folder.open(tmp_path)


def test_tensors_that_were_never_gathered_are_reported(tmp_path: Path) -> None:
    write_model(tmp_path, 96)
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.flatten()[:0] for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"has 0 rows.*ZeRO stage 3"):
        adopt(Folder.open(tmp_path), tmp_path / "ours")


@pytest.mark.parametrize("name", ["gpt2", "llama, wide heads, tied"])
def test_a_tied_model_may_be_stored_under_the_name_of_its_output_layer(name: str, tmp_path: Path) -> None:
    """The save_model of safetensors writes one name of tensors that share memory; transformers reads such a file."""
    torch.manual_seed(0)
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    save_model(model, str(tmp_path / "model.safetensors"), {"format": "pt"})
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    adopt(Folder.open(tmp_path), tmp_path / "ours")
    found = open_model(tmp_path / "ours")
    rows = next(found.full_tensor(shape) for shape in found.table if shape.name == "word_embeddings.weight")
    stored = model.get_input_embeddings().weight.detach()
    assert torch.equal(rows[: len(stored)], stored)
