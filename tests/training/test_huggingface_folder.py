"""Folders of transformers that a run writes beside its checkpoints: the tool's bytes, one at a time, and what fails."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.format import layout
from megatron.checkpoint.save.folder_programs import FolderPrograms
from tests.end_to_end.runs import make_dataset, run
from tests.multi_rank import RankFailedError
from tools import convert_to_hf

LLAMA: dict[str, Any] = {"norm": "rmsnorm", "activation": "swiglu", "num_layers": 1, "eval_iters": 0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("background", [False, True], ids=["saved at once", "saved in the background"])
def test_a_run_writes_what_the_tool_writes(background: bool, dataset: str, tmp_path: Path) -> None:
    """Of every second checkpoint; the older ones are removed once they are converted."""
    save = tmp_path / "save"
    settings = {**LLAMA, "data_path": dataset, "train_iters": 4, "checkpoint_factor": 1, "save_hf_every": 2}
    run(1, tmp_path, save=str(save), checkpoint_async=background, keep_last_n_checkpoints=1, **settings)
    assert sorted(path.name for path in (save / "huggingface").iterdir()) == ["global_step2", "global_step4"]
    assert layout.iterations(save) == [4]
    assert convert_to_hf.main([f"--input-dir={save}", f"--output-dir={tmp_path / 'out'}"]) == 0
    found, expected = save / "huggingface" / "global_step4", tmp_path / "out"
    names = sorted(path.name for path in expected.iterdir())
    assert "model.safetensors" in names
    assert [path.name for path in sorted(found.iterdir())] == names
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes()


def test_a_model_of_no_family_ends_the_run_before_it_starts(dataset: str, tmp_path: Path) -> None:
    settings = {**LLAMA, "data_path": dataset, "train_iters": 1, "checkpoint_factor": 1, "save_hf_every": 1}
    with pytest.raises(RankFailedError, match="norm"):
        run(1, tmp_path, save=str(tmp_path / "save"), **{**settings, "norm": "scalenorm"})
    assert layout.iterations(tmp_path / "save") == []


def test_a_program_that_fails_is_one_line_and_the_next_one_runs(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, time\nwhile not pathlib.Path(sys.argv[1]).with_name('go').exists(): time.sleep(0.01)\n"
        "sys.exit('no room') if sys.argv[1].endswith('2') else pathlib.Path(sys.argv[2]).mkdir()"
    )
    said: list[str] = []
    programs = FolderPrograms([sys.executable, "-c", code], 2, "copies", said.append)
    for number in (1, 2, 4):
        programs.send(tmp_path / f"global_step{number}")
    assert [path.name for path in programs.pending()] == ["global_step4", "global_step2"]
    (tmp_path / "go").touch()
    programs.finish()
    assert programs.pending() == []
    assert said == ["no copies folder for global_step2: no room"]
    assert [path.name for path in (tmp_path / "copies").iterdir()] == ["global_step4"]
