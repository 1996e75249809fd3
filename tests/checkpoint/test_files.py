"""Files are whole or absent, damage is found, and reading never runs code."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.format import files, integrity, layout, rng
from megatron.errors import RunError


class Attack:
    """A pickle that leaves a trace when it is executed."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def checkpoint(directory: Path) -> Path:
    written = [
        files.write_tensors(directory / "mp_rank_00_model_states.pt", {"module": {"a": torch.ones(100)}}),
        files.write_json(directory / layout.RUN, {"counters": {}}),
    ]
    integrity.write_manifest(directory, written)
    return directory


def test_a_full_checkpoint_has_no_damage(tmp_path: Path) -> None:
    assert integrity.damage(checkpoint(tmp_path), contents=True) == []


def test_damage_is_named(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path) / "mp_rank_00_model_states.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert integrity.damage(tmp_path) == []
    assert "content changed" in str(integrity.damage(tmp_path, contents=True)[0])
    weights.write_bytes(content[:-10])
    assert "bytes where" in str(integrity.damage(tmp_path)[0])
    weights.unlink()
    assert "missing" in str(integrity.damage(tmp_path)[0])


def test_code_in_a_pickle_never_runs(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"module": Attack(trace)}, tmp_path / "torch.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Attack(trace)))
    for name in ("torch.pt", "plain.pt"):
        with pytest.raises(
            RunError, match=r"cannot be read: (Trying to load )?[Uu]nsupported (GLOBAL \w+\.mkdir|operand)"
        ):
            files.read_tensors(tmp_path / name)
    assert not trace.exists()


def test_files_from_before_archives_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(5.0)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(files.read_tensors(tmp_path / "old.pt")["a"], torch.arange(5.0))


@pytest.mark.parametrize("archive", [False, True])
def test_whatever_bytes_change_the_error_is_reported(archive: bool, tmp_path: Path) -> None:
    """Reading gives values or a RunError, for any damage."""
    path, chance = tmp_path / "weights.pt", random.Random(archive)
    content = {"module": {"a": torch.randn(4, 3), "b": torch.ones(7).bfloat16()}, "numpy": rng.capture()["numpy"]}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    full, refused, reported = path.read_bytes(), 0, set()
    for _ in range(300):
        changed = bytearray(full)
        for _ in range(chance.choice((1, 4))):
            changed[chance.randrange(min(len(full), chance.choice((400, 3000, len(full)))))] = chance.randrange(256)
        path.write_bytes(changed[: chance.choice((len(full), chance.randrange(len(full))))])
        try:
            files.read_tensors(path)
        except RunError as error:
            refused += 1
            reported.add(str(error).split(": ")[1])
    assert reported == {"the file cannot be read"}
    assert refused > 100


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all"])
def test_files_of_another_kind_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"weights\.pt"):
        files.read_tensors(path)


def test_random_generators_come_back(tmp_path: Path) -> None:
    import numpy

    files.write_tensors(tmp_path / "rng.pt", rng.capture())
    drawn = (random.random(), float(numpy.random.rand()), torch.rand(3))
    rng.restore(files.read_tensors(tmp_path / "rng.pt"))
    again = (random.random(), float(numpy.random.rand()), torch.rand(3))
    assert drawn[:2] == again[:2]
    assert torch.equal(drawn[2], again[2])


def test_names_of_the_public_layout(tmp_path: Path) -> None:
    assert layout.layer_file(2, 1) == "layer_02-model_01-model_states.pt"
    assert layout.model_file(3) == "mp_rank_03_model_states.pt"
    for name in ("global_step10", "global_step9", "global_step11.partial", "other"):
        (tmp_path / name).mkdir()
    assert layout.iterations(tmp_path) == [9, 10]
