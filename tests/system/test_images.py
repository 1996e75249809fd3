"""The Dockerfile and the Apptainer definition: the same steps, after which a user without rights trains."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.runs import BASE
from tests.system.images import ROOT, Machine, Stage, definition, dockerfile, init_distributed, layered


@pytest.fixture(scope="module")
def docker() -> list[Stage]:
    return dockerfile((ROOT / "Dockerfile").read_text())


@pytest.fixture(scope="module")
def apptainer() -> list[Stage]:
    return definition((ROOT / "neox.def").read_text())


def test_both_take_the_same_steps(docker: list[Stage], apptainer: list[Stage]) -> None:
    system, build, final = docker
    first, last = apptainer
    assert (build.base, final.base) == (system.name, system.name)
    assert first.name == "build" and last.name == ""
    assert first.packages() == last.packages() == system.packages() >= {"g++", "python3-venv", "pdsh"}
    assert first.commands("make install") == build.commands("make install") != []
    environment = {word for what, words in final.steps if what == "ENV" for word in words.split()}
    assert {word for what, words in last.steps if what == "ENV" for word in words.split()} == environment
    copied = {word for what, words in build.steps if what == "COPY" for word in words.split()[:-1]}
    assert {words.split()[0] for what, words in first.steps if what == "COPY"} == copied
    assert "--from=build /opt/venv /opt/venv" in [words for what, words in last.steps if what == "COPY"]
    assert ("USER", "neox") in final.steps


def test_the_definition_names_files_that_exist(apptainer: list[Stage]) -> None:
    for stage in apptainer:
        for what, words in stage.steps:
            source = words.split()[0]
            assert what != "COPY" or source.startswith("--from") or (ROOT / source).exists(), words
    doors = {path.name for path in ROOT.glob("*.py")} - {"setup.py"}
    assert doors <= {words.split()[0] for what, words in apptainer[-1].steps if what == "COPY"}


@pytest.mark.system
@pytest.mark.long
def test_the_steps_make_a_root_in_which_a_user_trains(docker: list[Stage], tmp_path: Path) -> None:
    """All of it in a new root of this machine's own release: packages, compilation, and two steps of training."""
    assert os.geteuid() == 0 and shutil.which("debootstrap"), "apt install debootstrap, and be root"
    init_distributed(tmp_path / "base")
    system, build, final = docker
    with layered(tmp_path / "base", tmp_path / "system") as first:
        Machine(first).run(system, {})
        with layered(first, tmp_path / "build") as second:
            made = Machine(second)
            made.run(build, {})
            with layered(first, tmp_path / "final") as third:
                machine = Machine(third)
                machine.run(final, {"build": second})
                trains(machine, third)


def trains(machine: Machine, root: Path) -> None:
    """What a user of the image does."""
    assert machine.user == "neox"
    assert machine.call("id -un").strip() == "neox"
    assert (
        machine.call("python -c 'import megatron; print(megatron.__file__)'").strip()
        == "/opt/neox/megatron/__init__.py"
    )
    assert "deepy.py" in machine.call("python deepy.py --help")
    text = [json.dumps({"text": "one line of text after another " * 40}) for _ in range(60)]
    (root / "home/neox/text.jsonl").write_text("\n".join(text) + "\n")
    settings = {**BASE, "train_iters": 2, "eval_iters": 0, "num_gpus": 2, "data_path": "text_text_document"}
    (root / "home/neox/run.json").write_text(
        json.dumps({**settings, "save": "save", "checkpoint_factor": 2, "log_dir": "logs"})
    )
    machine.cwd = machine.home
    prepare = "python /opt/neox/tools/preprocess_data.py --input text.jsonl --output-prefix text --append-eod"
    machine.call(f"{prepare} --tokenizer-type CharLevelTokenizer")
    said = machine.call("python /opt/neox/deepy.py train.py run.json")
    assert "iteration 2/2" in said
    assert (root / "home/neox/save/latest").read_text() == "global_step2"
