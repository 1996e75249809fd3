"""Is a checkpoint whole? Its manifest lists every file with size and SHA-256, and is written last."""

from __future__ import annotations

from pathlib import Path

from megatron.checkpoint import files, layout
from megatron.errors import Mistake


def write_manifest(directory: Path) -> None:
    """Lists every file under the directory; after this the checkpoint is complete."""
    entries = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": files.digest(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != layout.MANIFEST
    }
    files.write_json(directory / layout.MANIFEST, {"version": 1, "files": entries})


def is_ours(directory: Path) -> bool:
    """Whether the checkpoint has a manifest; one written by other tools has none and is taken at its word."""
    return (directory / layout.MANIFEST).is_file()


def damage(directory: Path, *, contents: bool = False) -> list[Mistake]:
    """What is wrong with a checkpoint of ours, file by file; empty when it is whole.

    Sizes are always compared; with `contents` the SHA-256 of every file is too, which reads them all.
    """
    manifest = files.read_json(directory / layout.MANIFEST)
    faults = []
    for name, expected in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            faults.append(Mistake("the file is missing", where=str(path)))
        elif path.stat().st_size != expected["bytes"]:
            faults.append(
                Mistake(f"{path.stat().st_size} bytes where {expected['bytes']} were written", where=str(path))
            )
        elif contents and files.digest(path) != expected["sha256"]:
            faults.append(Mistake("its content changed after it was written", where=str(path)))
    return faults
