"""Files as public GPT-NeoX and DeepSpeed write them: older names, random states, foreign objects; no code runs."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler

from megatron.checkpoint.format import files, layout
from megatron.checkpoint.format.weight_shards import WeightFiles, key_of
from megatron.checkpoint.load.merge_shards import read_shards
from tests.architecture.source import PRODUCT
from tests.checkpoint.saved import TABLE

ROOT = Path(__file__).resolve().parents[2]


def test_numpy_states_and_deepspeed_objects_are_read_without_their_code(tmp_path: Path) -> None:
    content = {
        "module": None,
        "np_rng_state": numpy.random.RandomState(3).get_state(),
        "optimizer": {"loss_scaler": LossScaler(scale=64.0)},
        "iteration": 7,
    }
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    read = files.read_tensors(tmp_path / "mp_rank_00_model_states.pt")
    assert read["iteration"] == 7
    assert numpy.array_equal(read["np_rng_state"][1], content["np_rng_state"][1])
    scaler = read["optimizer"]["loss_scaler"]
    assert type(scaler) is files.Foreign
    assert scaler.cur_scale == 64.0


def test_older_names_of_the_mlp_and_tables_beside_the_weights(tmp_path: Path) -> None:
    old = {"mlp.linear1": "mlp.dense_h_to_4h", "mlp.linear2": "mlp.dense_4h_to_h"}
    expected = {key_of(shape): torch.randn(shape.shape) for shape in TABLE}
    module = {}
    for key, tensor in expected.items():
        for new, name in old.items():
            key = key.replace(new, name)
        module[f"sequential.{key}"] = tensor
    module["sequential.2.attention.rotary_emb.inv_freq"] = torch.ones(2)
    torch.save({"module": module}, tmp_path / layout.model_file(0))
    stored = WeightFiles.open(tmp_path)
    assert stored.keys() == expected.keys()
    found = read_shards(stored, TABLE, summed=False, model_rank=0, model_size=1)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_older_names_of_a_gated_mlp_on_two_ranks(tmp_path: Path) -> None:
    """w1 is the half that the activation sees, w3 the plain one; each rank has its part of both."""
    gate, up, down = torch.randn(16, 4), torch.randn(16, 4), torch.randn(4, 16)
    for rank in range(2):
        rows = slice(8 * rank, 8 * rank + 8)
        content = {"mlp.w1.weight": gate[rows], "mlp.w3.weight": up[rows], "mlp.w2.weight": down[:, rows]}
        torch.save({name: part.clone() for name, part in content.items()}, tmp_path / layout.layer_file(2, rank))
    stored = WeightFiles.open(tmp_path)
    first, second = stored.shards("2.mlp.linear1.weight")
    assert torch.equal(torch.cat((first[:8], second[:8])), up)
    assert torch.equal(torch.cat((first[8:], second[8:])), gate)
    assert torch.equal(torch.cat(stored.shards("2.mlp.linear2.weight"), 1), down)


def test_one_position_reads_pickles_and_deepspeed_reads_none() -> None:
    """torch.load is called in one file, and no method of DeepSpeed's that calls it is called anywhere."""
    loads = [source.path for source in PRODUCT if "torch.load(" in source.text]
    assert [str(path).removeprefix(f"{ROOT}/") for path in loads] == ["megatron/checkpoint/format/files.py"]
    forbidden = (".load_checkpoint(", "load_universal", "ds_to_universal", "zero_to_fp32", ".load_state_dir(")
    assert [(str(source.path), name) for source in PRODUCT for name in forbidden if name in source.text] == []
