"""Where things are inside a save directory.

    <save>/latest                              the name of the newest complete checkpoint, global_step<N>
    <save>/evaluated.json                      the iteration of the last complete evaluation
    <save>/global_step<N>/
        layer_LL-model_TT-model_states.pt      weights of layer LL, in pipelined runs
        mp_rank_XX_model_states.pt             facts of the run; without a pipeline the weights too
        configs/                               the configuration
        state/rank_RRRRR.{json,pt}             optimizer slices of one rank, and their index
        state/rng_RRRRR.pt                     random generators of one rank
        state/run.json                         counters and layout of the run, the checkpoints before it
        state/answers.pt                       logits of a fixed input, where they are wanted
        manifest.json                          every file's size and SHA-256, written last

The weight files have the names and contents of the public GPT-NeoX layout, so that public tools read them.
"""

from __future__ import annotations

import re
from pathlib import Path

LATEST = "latest"
EVALUATED = "evaluated.json"
MANIFEST = "manifest.json"
STATE = "state"
RUN = "state/run.json"
ANSWERS = "state/answers.pt"
CONFIGS = "configs"
RESOLVED = "configs/resolved.json"

_STEP = re.compile(r"global_step(0|[1-9][0-9]*)")
_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")


def step_directory(save: Path, iteration: int) -> Path:
    """The folder of the checkpoint taken after `iteration` [steps]."""
    return save / f"global_step{iteration}"


def partial_directory(save: Path, iteration: int) -> Path:
    """Where that checkpoint is written before it gets its name."""
    return save / f"global_step{iteration}.partial"


def iteration_of(directory: Path) -> int | None:
    """Return the iteration in a folder's name, or None if it is no checkpoint's name."""
    match = _STEP.fullmatch(directory.name)
    return int(match.group(1)) if match else None


def same_folder(one: Path, other: Path) -> bool:
    """Whether two paths name the same folder, whatever they are called; neither needs to exist."""
    return one.resolve() == other.resolve()


def iterations(save: Path) -> list[int]:
    """The iterations of the checkpoints under `save`, in rising order; complete or not."""
    if not save.is_dir():
        return []
    found = (iteration_of(entry) for entry in save.iterdir() if entry.is_dir())
    return sorted(number for number in found if number is not None)


def layer_file(layer: int, model_rank: int) -> str:
    """The weight file of one layer of a pipelined run."""
    return f"layer_{layer:02d}-model_{model_rank:02d}-model_states.pt"


def model_file(rank: int) -> str:
    """The file of one rank of the model: all weights without a pipeline, the run's facts with one."""
    return f"mp_rank_{rank:02d}_model_states.pt"


def layer_files(directory: Path) -> dict[tuple[int, int], Path]:
    """(layer, tensor-parallel rank) -> weight file, for a checkpoint of a pipelined run."""
    return {
        (int(match.group(1)), int(match.group(2))): path
        for path in directory.iterdir()
        if (match := _LAYER.fullmatch(path.name))
    }


def model_files(directory: Path) -> dict[int, Path]:
    """Model rank -> file, in rising order."""
    found = {int(match.group(1)): path for path in directory.iterdir() if (match := _MODEL.fullmatch(path.name))}
    return dict(sorted(found.items()))


def slice_file(rank: int) -> str:
    """The optimizer slices that a global rank wrote; the index beside it ends in .json."""
    return f"{STATE}/rank_{rank:05d}.pt"


def slice_index(rank: int) -> str:
    """What the slices of a global rank are, without their values."""
    return f"{STATE}/rank_{rank:05d}.json"


def rng_file(rank: int) -> str:
    """The random generators of a global rank."""
    return f"{STATE}/rng_{rank:05d}.pt"


def written_file(rank: int) -> str:
    """What a global rank has written, while a checkpoint is not complete."""
    return f"{STATE}/written_{rank:05d}.json"
