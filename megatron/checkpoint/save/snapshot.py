"""What one rank writes of a checkpoint: names and contents, made on demand or copied to the host beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.checkpoint.format import files
from megatron.checkpoint.format.files import Written


@dataclass
class Snapshot:
    """Files of one rank by their name inside the checkpoint."""

    tensors: dict[str, Callable[[], Any]] = field(default_factory=dict)
    """Name -> makes what torch.save stores; the tensors it returns are copies in the host's memory."""
    texts: dict[str, str] = field(default_factory=dict)
    """Name -> content."""

    def held(self) -> Snapshot:
        """The same with everything copied now, so that what the run does next changes nothing in it."""
        contents = {name: make() for name, make in self.tensors.items()}
        return Snapshot({name: _give(contents, name) for name in contents}, self.texts)

    def write(self, directory: Path) -> Iterator[Written]:
        """Writes the files one after another, dropping each content when it is on the disk."""
        for name in list(self.tensors):
            yield files.write_tensors(directory / name, self.tensors.pop(name)())
        for name, text in self.texts.items():
            yield files.write_text(directory / name, text)


def _give(contents: dict[str, Any], name: str) -> Callable[[], Any]:
    return lambda: contents.pop(name)
