"""Text files and their kinds, by file name.

    .jsonl .json    a JSON object a line, a document each
    .txt            one document
    .dat            documents one after another, each behind its length in 16 decimal digits (lm_dataformat)
    .tar .zip       files of the kinds above, one after another in the order of the archive; also files without an
                    ending, and .md, .rst, .tex and .text, which are one document each

Each may be compressed: .gz, .bz2 and .xz are read with the standard library, .zst with the package `zstandard`; .tgz,
.tbz2 and .txz are tar files. Members of an archive may be compressed as well.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from megatron.errors import ConfigError, ConfigIssue

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_TABLES = (".parquet", ".arrow", ".feather", ".orc", ".avro", ".csv", ".tsv")
NOT_READ = (*_TABLES, ".ndjson", ".tfrecord", ".7z", ".rar", ".lz4")
"""Endings of files that hold data and are not read; a directory with one is refused, as the file itself is."""
TEXT_IN_ARCHIVES = ("", ".md", ".rst", ".tex", ".text")


class Kind(enum.Enum):
    """How documents are in a file. The value: the endings of its name."""

    LINES = (".jsonl", ".json")
    FILE = (".txt",)
    LENGTHS = (".dat",)
    TAR = (".tar", ".tgz", ".tbz2", ".txz")
    ZIP = (".zip",)


@dataclass(frozen=True)
class TextFile:
    """A file to read."""

    path: Path
    """The file."""
    kind: Kind
    """Its kind, by name."""
    bytes: int
    """Its size on disk."""
    compressed: bool
    """Whether its content is not what is on disk."""


def kind_of(name: PurePath) -> tuple[Kind, str] | None:
    """The kind of a file and its compression, one of COMPRESSED or ""; None for a kind that is not known."""
    suffixes = [suffix.lower() for suffix in name.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    last = suffixes[-1] if suffixes else ""
    short = {".tgz": ".gz", ".tbz2": ".bz2", ".txz": ".xz"}
    if last in short and not compression:
        return Kind.TAR, short[last]
    return next(((kind, compression) for kind in Kind if last in kind.value), None)


def kind_of_member(name: PurePath) -> tuple[Kind, str] | None:
    """The same for a member of an archive; None for one that is not text."""
    known = kind_of(name)
    if known is None and name.suffix.lower() in COMPRESSED and PurePath(name.stem).suffix.lower() in TEXT_IN_ARCHIVES:
        return Kind.FILE, name.suffix.lower()
    if known is None and name.suffix.lower() in TEXT_IN_ARCHIVES:
        return Kind.FILE, ""
    return known if known is not None and known[0] not in (Kind.TAR, Kind.ZIP) else None


def find_text_files(names: Iterable[str], *, key: str = "input") -> list[TextFile]:
    """The files of those names, in the order given; a directory stands for the text files below it, sorted.

    Files and folders whose names begin with a dot, such as checkpoints of notebooks and what editors write, are not
    looked for.

    Raises ConfigError with every file that is missing or of an unknown kind, and with every directory that holds data
    of a kind that is not read. key: what named them.
    """
    found: list[TextFile] = []
    issues: list[ConfigIssue] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            below = [child for child in sorted(path.rglob("*")) if not is_hidden(child.relative_to(path))]
            children = [child for child in below if child.is_file()]
            paths = [child for child in children if kind_of(child) is not None]
            unread = [str(child) for child in children if kind_of(child) is None and _holds_data(child)]
            if unread:
                issues.append(_unread(unread, key, name))
            elif not paths:
                issues.append(ConfigIssue("there is no text file in this directory", key=key, value=name))
        else:
            paths = [path]
        for each in paths:
            known = _known(each, key)
            if isinstance(known, ConfigIssue):
                issues.append(known)
            else:
                found.append(known)
    ConfigError.raise_any(issues)
    if not found:
        raise ConfigError.of("no input file is named", key=key)
    return found


def is_hidden(path: PurePath) -> bool:
    """Returns whether a file was put there by another program unasked, such as .ipynb_checkpoints/a.jsonl or ._name.

    path: below the directory or archive that was named.
    """
    return any(part.startswith(".") and part != ".." for part in path.parts)


def _holds_data(path: PurePath) -> bool:
    return any(suffix.lower() in NOT_READ for suffix in path.suffixes[-2:])


def _unread(files: list[str], key: str, name: str) -> ConfigIssue:
    shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    hint = "make .jsonl of them, a JSON object a line, or name the files that are to be read one by one"
    return ConfigIssue(f"{len(files)} files of kinds that are not read: {shown}", key=key, value=name, hint=hint)


def _known(path: Path, key: str) -> TextFile | ConfigIssue:
    name = str(path)
    kind = kind_of(path)
    if kind is None:
        kinds = ", ".join(suffix for known in Kind for suffix in known.value)
        hint = f"name {kinds} files, or one of them compressed as {', '.join(COMPRESSED)}"
        return ConfigIssue("files of this kind are not read", key=key, value=name, hint=hint)
    try:
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except OSError as error:
        return ConfigIssue(f"cannot read the file ({error.strerror})", key=key, value=name)
    return TextFile(path, kind[0], size, bool(kind[1]))
