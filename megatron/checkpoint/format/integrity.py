"""Is a checkpoint whole? Its manifest lists every file with size and SHA-256, and is written last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron.checkpoint.format import files, layout
from megatron.checkpoint.format.files import Written
from megatron.errors import ConfigIssue, RunError

VERSION = 1
"""Of the manifest and of what it lists."""


def write_manifest(directory: Path, written: Iterable[Written]) -> None:
    """Lists the files of a checkpoint; after this it is complete.

    Raises RunError naming the files that cannot be seen from here as they were written.
    """
    entries = {str(each.path.relative_to(directory)): {"bytes": each.size, "sha256": each.sha256} for each in written}
    RunError.raise_any(
        ConfigIssue(
            "a rank wrote this file, and it is not whole where rank 0 looks",
            location=str(directory / name),
            hint="save to a folder on a file system that all nodes share",
        )
        for name, entry in entries.items()
        if not (directory / name).is_file() or (directory / name).stat().st_size != entry["bytes"]
    )
    files.write_json(directory / layout.MANIFEST, {"version": VERSION, "files": dict(sorted(entries.items()))})


def is_ours(directory: Path) -> bool:
    """Whether we wrote the checkpoint; one of another program has no manifest and is taken at its word."""
    return (directory / layout.MANIFEST).is_file() or (directory / layout.STATE).is_dir()


def damage(directory: Path, *, contents: bool = False, share: tuple[int, int] = (0, 1)) -> list[ConfigIssue]:
    """What is wrong with a checkpoint of ours, file by file; empty when it is whole.

    Sizes are always compared; with `contents` the SHA-256 of every file is too, which reads them all. share: (number,
    count) of this reader among several that look at every count-th file each.
    """
    manifest = files.read_json(directory / layout.MANIFEST)
    location = str(directory / layout.MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return [ConfigIssue("this is no list of a checkpoint's files", location=location)]
    if manifest.get("version") != VERSION:
        return [
            ConfigIssue(f"version {manifest.get('version')} is not one that can be read ({VERSION})", location=location)
        ]
    errors = []
    for name, expected in list(manifest["files"].items())[share[0] :: share[1]]:
        path = directory / name
        if not path.is_file():
            errors.append(ConfigIssue("the file is missing", location=str(path)))
        elif path.stat().st_size != expected["bytes"]:
            errors.append(
                ConfigIssue(f"{path.stat().st_size} bytes where {expected['bytes']} were written", location=str(path))
            )
        elif contents and files.digest(path) != expected["sha256"]:
            errors.append(ConfigIssue("its content changed after it was written", location=str(path)))
    return errors + _strangers(directory, manifest["files"])


def _strangers(directory: Path, listed: Mapping[str, object]) -> list[ConfigIssue]:
    """Files that look like a rank's and were not written with the others."""
    found = [*directory.glob("*.pt"), *(directory / layout.STATE).glob("rank_*")]
    names = sorted(str(path.relative_to(directory)) for path in found)
    return [
        ConfigIssue("this file does not belong to the checkpoint", location=str(directory / name))
        for name in names
        if name not in listed
    ]
