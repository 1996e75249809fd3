"""Keys that hold paths: `~` is expanded, and shell variables are rejected."""

from __future__ import annotations

import os
import re
from typing import Any

from megatron.errors import ConfigIssue

_SPLITS = ("train", "valid", "test")

PATH_KEYS = frozenset(
    {
        "save",
        "load",
        "data_path",
        *(f"{split}_data_paths" for split in _SPLITS),
        *(f"{split}_{what}_data_paths" for split in _SPLITS for what in ("label", "reward")),
        *(f"{side}_{split}_data_paths" for split in _SPLITS for side in ("pos", "neg")),
        *(f"{side}_{split}_label_data_paths" for split in _SPLITS for side in ("pos", "neg")),
        "vocab_file",
        "merge_file",
        "hostfile",
        "base_shapes_file",
        "log_dir",
        "tensorboard_dir",
        "memory_profiling_path",
        "fused_kernels_build_path",
        "sample_input_file",
        "sample_output_file",
        "eval_include_path",
        "eval_text",
        "eval_cloze",
        "evidence_data_path",
        "embedding_path",
        "qa_data",
        "titles_data_path",
        "retro_project_dir",
        "retro_embedder",
        "task_train_data",
        "task_valid_data",
        "pretrained_checkpoint",
    }
)
_VARIABLE = re.compile(r"\$(?:\w|\{)")


def expand_paths(name: str, value: Any) -> tuple[Any, list[ConfigIssue]]:
    """Expands `~` and `~user` in a value or a list of values; returns it with the issues of invalid paths."""
    if isinstance(value, (list, tuple)):
        pairs = [expand_paths(name, item) for item in value]
        return [item for item, _ in pairs], [issue for _, found in pairs for issue in found]
    if not isinstance(value, str):
        return value, []
    if not value.strip():
        return value, [ConfigIssue("this is no path", key=name, value=value, hint="leave the key out")]
    if _VARIABLE.search(value):
        hint = "write the path out, or give the key on the command line, where the shell fills variables in"
        return value, [ConfigIssue("variables of the shell have no meaning here", key=name, value=value, hint=hint)]
    if not value.startswith("~"):
        return value, []
    expanded = os.path.expanduser(value)
    if expanded.startswith("~"):
        owner = value.partition("/")[0]
        hint = f"write the path out; a folder of that name is ./{owner}"
        return value, [ConfigIssue(f"there is no home folder for {owner}", key=name, value=value, hint=hint)]
    return expanded, []
