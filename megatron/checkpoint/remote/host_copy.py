"""Checkpoints where hosts share no file system: the folder of every host gets the whole one.

Each rank writes its files where it is. They then travel through the process group to the first rank of every other
folder, so that each host can be read from alone, in any layout, and may be lost. What a save sends is its own size, to
all hosts at once; the disk of every host holds all of it.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist

from megatron.atomic import flush_to_disk, write_atomic
from megatron.checkpoint.format import files, layout
from megatron.checkpoint.save.protocol import together
from megatron.config.schema.checkpoint import CheckpointSection
from megatron.distributed.init import host_name
from megatron.distributed.process_group import all_gather_items, all_gather_list, device
from megatron.log import get_logger

_log = get_logger(__name__)

CHUNK = 16 << 20  # [bytes] of a file sent at once


@dataclass(frozen=True)
class Sharing:
    """Which ranks see the same folder."""

    rank: int
    """This one."""
    groups: tuple[tuple[int, ...], ...]
    """Of all ranks, by the first of each."""

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that see what this one sees."""
        return next(group for group in self.groups if self.rank in group)

    @property
    def leads(self) -> bool:
        """Whether this rank does what one of its folder must do."""
        return self.members[0] == self.rank

    @property
    def share(self) -> tuple[int, int]:
        """(number, count) of this rank among those of its folder."""
        return self.members.index(self.rank), len(self.members)


@dataclass(frozen=True)
class Item:
    """A file to send: its name in the folder, its size [bytes] and the rank that sends it."""

    name: str
    """Path in the folder."""
    size: int
    """Its size [bytes]."""
    owner: int
    """The rank that has it."""


def one_folder() -> Sharing:
    """All ranks see the same."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Sharing(rank, (tuple(range(size)),))


def by_host() -> Sharing:
    """Ranks of one host see the same. Collective."""
    return _grouped(all_gather_list(host_name()))


def by_looking(folder: Path) -> Sharing:
    """Ranks see the same that see each other's files in the folder, which is made where it is not there. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return one_folder()
    rank = dist.get_rank()
    token: list[str] = [uuid.uuid4().hex]
    dist.broadcast_object_list(token, src=0)
    mine = folder / f".seen-by-{token[0]}-{rank}"

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        mine.touch()

    together(write, f"writing to {folder}")
    again = folder / f".seen-by-{token[0]}-again-{rank}"
    again.touch()  # a network file system then looks anew
    again.unlink()
    seen = min(int(path.name.rpartition("-")[2]) for path in folder.glob(f".seen-by-{token[0]}-[0-9]*"))
    groups = _grouped(all_gather_list(seen))
    mine.unlink(missing_ok=True)
    return groups


def _grouped(folders: Sequence[object]) -> Sharing:
    """The groups of ranks of which each says in which place it is."""
    found: dict[object, list[int]] = {}
    for rank, folder in enumerate(folders):
        found.setdefault(folder, []).append(rank)
    return Sharing(dist.get_rank() if dist.is_initialized() else 0, tuple(map(tuple, found.values())))


def spread(items: Sequence[Item], source: Path, target: Path, receives: Callable[[Item], bool]) -> None:
    """Sends files from their owners' folder `source` into the folder `target` of those that receive them. Collective.

    Raises RunError on every rank where one cannot read or write.

    Args:
        items: The same on every rank.
        source: Folder that this rank reads.
        target: Folder that this rank writes.
        receives: True if this rank writes the files of its host.
    """
    errors: list[OSError] = []
    rank = dist.get_rank()
    for item in items:
        out = None
        try:
            out = _opened(target / item.name) if item.owner != rank and receives(item) else None
        except OSError as error:
            errors.append(error)
        pieces = _pieces(source / item.name, errors) if item.owner == rank else None
        for start in range(0, item.size, CHUNK):
            _pass_on(min(CHUNK, item.size - start), item.owner, pieces, out, errors)
        if out is not None:
            _finish(out, errors)
    together(lambda: _raise(errors), f"sending {source} to the other hosts")


def _pass_on(
    size: int, owner: int, pieces: Iterator[bytes] | None, out: BinaryIO | None, errors: list[OSError]
) -> None:
    """One piece of a file from its owner to everybody; who wants it writes it down."""
    buffer = torch.zeros(size, dtype=torch.uint8)
    if pieces is not None:
        piece = next(pieces, b"")
        buffer[: len(piece)] = torch.frombuffer(bytearray(piece), dtype=torch.uint8) if piece else 0
    sent = buffer.to(device())
    dist.broadcast(sent, src=owner)
    if out is not None and not out.closed:
        try:
            out.write(sent.cpu().numpy().data)
        except OSError as error:
            errors.append(error)
            out.close()


def _opened(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("wb")


def _pieces(path: Path, errors: list[OSError]) -> Iterator[bytes]:
    """The file in pieces; the others wait for as many bytes as were announced, so an error is kept for later."""
    try:
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                yield piece
    except OSError as error:
        errors.append(error)


def _finish(out: BinaryIO, errors: list[OSError]) -> None:
    if out.closed:
        return
    try:
        with out:
            flush_to_disk(out)
    except OSError as error:
        errors.append(error)


def _raise(errors: Sequence[OSError]) -> None:
    if errors:
        raise errors[0]


def copy_to_missing_hosts(section: CheckpointSection, *, shared: bool) -> None:
    """Every host gets the checkpoint that `load` and `iteration` name, from one that has it. Collective.

    shared: all hosts see the same files, so there is nothing to do. Which iteration is meant without `iteration`: the
    newest that `latest` names on any host. A checkpoint of another program must be on every host already.
    """
    if shared or section.load is None or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    load, sharing = Path(section.load), by_host()
    everyone = all_gather_list(_meant(load, section.iteration))
    newest = max((iteration for iteration in everyone if iteration is not None), default=None)
    if newest is None:
        return
    complete = all_gather_list(_complete(load, newest))
    lacking = {group[0] for group in sharing.groups if not complete[group[0]]}
    if not lacking:
        return
    owner = complete.index(True)
    name = layout.step_directory(load, newest).name
    _log.info("%s goes to %d hosts that lack it", name, len(lacking))
    items = all_gather_items(_listed(load / name, owner) if sharing.rank == owner else [])
    beside = load / f"{name}.arriving.partial"
    spread(items, load / name, beside, lambda item: sharing.rank in lacking)

    def arrive() -> None:
        if sharing.rank in lacking:
            shutil.rmtree(load / name, ignore_errors=True)  # what a crash has left has no manifest
            beside.rename(load / name)
            write_atomic(load / layout.LATEST, name, durable=True)

    together(arrive, f"completing {load / name}")


def _meant(load: Path, iteration: int | None) -> int | None:
    """The iteration that this host would load: the given one, what `latest` names, else the newest; None if none."""
    found = [number for number in layout.iterations(load) if _complete(load, number)]
    if iteration is not None:
        return iteration if iteration in found else None
    pointer = load / layout.LATEST
    named = layout.iteration_of(Path(pointer.read_text(errors="replace").strip())) if pointer.is_file() else None
    return named if named in found else max(found, default=None)


def _complete(load: Path, iteration: int) -> bool:
    return (layout.step_directory(load, iteration) / layout.MANIFEST).is_file()


def _listed(directory: Path, owner: int) -> list[Item]:
    """The files of a checkpoint, its manifest last."""
    entries = files.read_json(directory / layout.MANIFEST)["files"]
    items = [Item(str(name), int(entry["bytes"]), owner) for name, entry in entries.items()]
    return [*items, Item(layout.MANIFEST, (directory / layout.MANIFEST).stat().st_size, owner)]
