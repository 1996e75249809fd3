"""Loading reports what matches, stops on what does not, and runs no code, whichever file a stranger has changed."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.format import files, integrity, layout
from megatron.checkpoint.format.files import Written
from megatron.checkpoint.huggingface.import_model import adopt
from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.load import loader
from megatron.checkpoint.load.loader import find_checkpoint
from megatron.config import Config, Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_inference_engine
from megatron.errors import ConfigError, RunError
from megatron.param_table import ModelDims, tensors
from tests.checkpoint.huggingface.models import save
from tests.end_to_end.runs import make_dataset, run
from tests.multi_rank import RankFailedError
from tools import convert_from_hf, convert_to_hf, inspect_checkpoint, reshape_checkpoint


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A small model as a checkpoint of another program: public files without a manifest."""
    save("neox", tmp_path / "theirs")
    adopt(Folder.open(tmp_path / "theirs"), tmp_path / "ours")
    (tmp_path / "ours" / "global_step0" / layout.MANIFEST).unlink()
    (tmp_path / "ours" / "global_step0" / layout.STATE).rmdir()
    return tmp_path / "ours"


def configuration(folder: Path, **changed: Any) -> Config:
    reported = Folder.open(folder.parent / "theirs").settings() | {"vocab_size": 96, "seq_length": 24} | changed
    reported |= {"load": str(folder), "user_script": "generate.py"}
    return resolve([], reported, Resources(1)).config.for_inference()


def load(folder: Path, **changed: Any) -> None:
    build_inference_engine(configuration(folder, **changed), Topology.single(), 96)


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edits the weights by name."""
    path = folder / "global_step0" / layout.model_file(0)
    content = torch.load(path, weights_only=True)
    edit(content["module"])
    torch.save(content, path)


def test_what_matches_is_reported(ours: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load(ours)
    assert "28 tensors matched, 0 missing, 0 unexpected" in caplog.text


def test_settings_that_fit_the_tensors_of_another_model_are_refused(ours: Path) -> None:
    heads = Folder.open(ours.parent / "theirs").settings()["num_attention_heads"] // 2
    with pytest.raises(ConfigError, match=rf"num_attention_heads = {heads}: the checkpoint .* was trained with"):
        load(ours, num_attention_heads=heads)


def test_missing_and_unexpected_tensors_stop_the_run(ours: Path) -> None:
    name = "sequential.2.mlp.linear1.bias"
    change(ours, lambda module: module.update({"sequential.2.mlp.gate": module.pop(name)}))
    with pytest.raises(RunError) as caught:
        load(ours)
    assert "the model lacks: 2.mlp.gate" in str(caught.value)
    assert "the checkpoint lacks: 2.mlp.linear1.bias" in str(caught.value)


def test_the_hint_for_updates_is_one_that_helps() -> None:
    stored, missing_key = "2.attention.query_key_value.lora_A.weight", "2.attention.dense.lora_A.weight"

    def hints(unexpected: list[str], missing: list[str]) -> set[str | None]:
        return {issue.hint for issue in loader._strangers(unexpected, missing, {missing_key}, "global_step5")}

    assert hints([], [missing_key]) == {"set finetune: true to start them beside the checkpoint's model"}
    own = {"give the configuration the lora of the checkpoint, or merge it with tools/merge_lora.py"}
    assert hints([stored], []) == own
    assert hints([stored], [missing_key]) == own  # finetune: true takes no model with other updates


class Attack:
    """A pickle that leaves a trace when it is executed."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.trace,)


class HiddenAttack(Attack):
    """The same behind names that the list of what may be read allows."""

    def __reduce__(self) -> tuple[object, tuple[Any, ...]]:  # type: ignore[override]
        import codecs

        return codecs.encode, (Attack(self.trace), "utf-8")


def forge(path: Path, content: object, *, plain: bool) -> None:
    """Puts a pickle in place of a file. plain: one that torch did not write."""
    if plain:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)


def create(directory: Path) -> None:
    """A manifest of the files as they are."""
    listed = [directory / name for name in json.loads((directory / layout.MANIFEST).read_text())["files"]]
    integrity.write_manifest(directory, [Written(each, each.stat().st_size, files.digest(each)) for each in listed])


@pytest.mark.parametrize("kind", [Attack, HiddenAttack])
@pytest.mark.parametrize("plain", [False, True])
def test_no_reader_runs_the_code_of_a_foreign_pickle(
    kind: type[Attack], plain: bool, ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights in the public layout and in a folder of transformers, through every tool that reads them."""
    trace = tmp_path / "trace"
    forge(ours / "global_step0" / layout.model_file(0), {"module": kind(str(trace))}, plain=plain)
    with pytest.raises(RunError, match="cannot be read"):
        load(ours)
    folder = ["--input-dir", str(ours), "--output-dir", str(tmp_path / "out")]
    assert convert_to_hf.main(folder) == 1
    assert inspect_checkpoint.main([str(ours)]) == 1
    assert reshape_checkpoint.main(["--load-dir", str(ours), "--save-dir", str(tmp_path / "cut")]) == 1
    theirs = tmp_path / "theirs"
    (theirs / "model.safetensors").unlink()
    forge(theirs / "pytorch_model.bin", {"gpt_neox.embed_in.weight": kind(str(trace))}, plain=plain)
    assert convert_from_hf.main(["--input-dir", str(theirs), "--output-dir", str(tmp_path / "adopted")]) == 1
    assert capsys.readouterr().err.count("the file cannot be read") == 4
    assert not trace.exists()


def test_a_run_runs_no_code_of_its_checkpoint(tmp_path: Path) -> None:
    """Every file of a checkpoint of ours, forged together with its manifest, on the way of a resume under ZeRO."""
    settings: dict[str, Any] = {"data_path": make_dataset(tmp_path), "zero_optimization": {"stage": 1}}
    settings |= {"save": str(tmp_path / "save"), "load": str(tmp_path / "save"), "checkpoint_factor": 100}
    checked = {"checkpoint_validation_with_forward_pass": True}
    run(1, tmp_path, **settings, **checked, exit_interval=1)
    directory, trace = tmp_path / "save" / "global_step1", tmp_path / "trace"
    pickles = sorted(directory.rglob("*.pt"))
    assert len(pickles) == 4, "weights, optimizer, random generators, logits"
    for path in pickles:
        content = path.read_bytes()
        forge(path, {"module": Attack(str(trace))}, plain=False)
        create(directory)
        with pytest.raises(RankFailedError, match=rf"{path.name}.*cannot be read"):
            run(1, tmp_path / "again", **settings, **checked)
        path.write_bytes(content)
        create(directory)
    assert not trace.exists()
    run(1, tmp_path / "again", **settings, **checked, exit_interval=2)


def test_the_stored_embedding_is_read_once(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the largest tensor of many models, and its rows and precision are asked for several times."""
    config = configuration(ours)
    table = tensors(ModelDims.of(config.model, config.moe, config.mixers), 96)
    checkpoint = find_checkpoint(config, table, weights_only=True)
    assert checkpoint is not None
    read: list[str] = []
    shards = checkpoint.weights.shards
    monkeypatch.setattr(checkpoint.weights, "shards", lambda key: read.append(key) or shards(key))
    assert [checkpoint.rows, checkpoint.rows] == [96, 96]
    assert read == ["0.word_embeddings.weight"]
