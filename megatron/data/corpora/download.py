"""Fetch a file over HTTP so that it is whole or not there.

A download goes to `<name>.part`, and what identifies the server's file (ETag or date) to `<name>.part.json`. A transfer
that broke off goes on where it stopped, in this run or a later one, if the server still has the same file. The SHA-256
of a complete file is compared with the one that is known and kept in the folder's `SHA256SUMS`, in the format of
`sha256sum`; a line that is there already pins the file.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.atomic import flush_to_disk, write_atomic
from megatron.errors import RunError

SUMS = "SHA256SUMS"
ATTEMPTS = 4  # in a row that bring no byte, before a source is given up
FIRST_WAIT = 1.0  # doubled after each attempt [s]
TIMEOUT = 60.0  # without a byte [s]
_CHUNK = 1 << 20
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_AGENT = "neox"


@dataclass(frozen=True)
class DownloadSource:
    """A file."""

    name: str
    """Name of the file."""
    urls: tuple[str, ...]
    """Where it may be had, tried in order."""
    sha256: str | None = None
    """Of its content, where it is known."""
    member_sha1: tuple[str, str] | None = None
    """Of a zip file, the name of a member and the SHA-1 of its content, where those are what is published."""


@dataclass(frozen=True)
class Transfer:
    """How far a download is [bytes]."""

    name: str
    """Name of the file."""
    done: int
    """Bytes that have arrived."""
    total: int | None
    """None where the server does not say."""


class _Gone(Exception):
    """A source that cannot be had, in words."""


class _BrokenOff(Exception):
    """A transfer that ended before the file did, in words: worth another attempt."""


def fetch(
    source: DownloadSource,
    folder: Path,
    *,
    again: bool = False,
    first_wait: float = FIRST_WAIT,
    report: Callable[[Transfer], None] = lambda transfer: None,
) -> str:
    """Brings a file into the folder, unless it is there, and returns its SHA-256.

    Raises RunError, with every source's reason, when it cannot be had, and when its checksum is not the known one.

    Args:
        source: The file.
        folder: Where to put it.
        again: Fetch it although it is there.
        first_wait: [s] before the second attempt.
        report: Called with the progress of the transfer.
    """
    target = folder / source.name
    sums = read_sums(folder)
    known = source.sha256 or sums.get(source.name)
    if again:
        target.unlink(missing_ok=True)
    if target.exists() and sums.get(source.name) == known is not None:
        return known  # it was compared when it came
    if target.exists():
        found = sha256_of(target)
        _compare(source, target, found, known, "fetch it again with -f, or take the file away")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _from_any(source, target, first_wait, report)
        found = sha256_of(_part(target))
        try:
            _compare(source, _part(target), found, known, "nothing was kept; run again, or name a copy with --mirror")
        except RunError:
            _part(target).unlink()
            raise
        os.replace(_part(target), target)
        _validator_file(target).unlink(missing_ok=True)
    _keep_sum(folder, source.name, found)
    return found


def _compare(source: DownloadSource, path: Path, found: str, known: str | None, hint: str) -> None:
    """Raises RunError unless the file is the known one."""
    if known is not None and found != known:
        by = "" if source.sha256 else f" that {SUMS} gives"
        hint += "" if source.sha256 else f"; where its maker changed it, take its line out of {SUMS}"
        raise RunError.of(f"its SHA-256 is {found}, not the {known}{by}", location=str(path), hint=hint)
    if source.member_sha1 is not None:
        member, expected = source.member_sha1
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as content:
                digest = hashlib.sha1(usedforsecurity=False)
                while chunk := content.read(_CHUNK):
                    digest.update(chunk)
        except (KeyError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise RunError.of(
                f"it is no whole zip file with {member} in it ({error})", location=str(path), hint=hint
            ) from error
        if digest.hexdigest() != expected:
            what = f"the SHA-1 of {member} in it is {digest.hexdigest()}, not the published {expected}"
            raise RunError.of(what, location=str(path), hint=hint)


def sha256_of(path: Path) -> str:
    """The digest of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, as the folder's SHA256SUMS has them."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    found = (re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line.strip()) for line in lines)
    return {match[2]: match[1].lower() for match in found if match}


def _keep_sum(folder: Path, name: str, digest: str) -> None:
    sums = read_sums(folder) | {name: digest}
    write_atomic(folder / SUMS, "".join(f"{each}  {file}\n" for file, each in sorted(sums.items())))


def _from_any(source: DownloadSource, target: Path, first_wait: float, report: Callable[[Transfer], None]) -> None:
    reasons = []
    for url in source.urls:
        try:
            _patiently(url, target, first_wait, report)
        except _Gone as error:
            reasons.append(f"{url}: {error}")
        else:
            return
    checked = f" (SHA-256 {source.sha256})" if source.sha256 else ""
    raise RunError.of(
        f"{source.name} cannot be fetched: {'; '.join(reasons) or 'no source is known'}",
        location=str(target),
        hint="run again where the source can be reached; if it is gone for good, name a folder that has a copy with "
        f"--mirror or put the file there yourself{checked}, and run again",
    )


def _patiently(url: str, target: Path, first_wait: float, report: Callable[[Transfer], None]) -> None:
    """Attempts until the file is complete. Raises _Gone when the source is given up."""
    wait, fruitless = first_wait, 0
    while True:
        before = _size(_part(target))
        try:
            _once(url, target, report)
            return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in _TRANSIENT:
                raise _Gone(f"HTTP {error.code} {error.reason}") from error
            reason = f"HTTP {error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            inner = getattr(error, "reason", error)
            reason = str(inner) or type(inner).__name__
            if isinstance(inner, FileNotFoundError):  # of a folder that --mirror names
                raise _Gone("there is no such file") from error
        except _BrokenOff as error:
            reason = str(error)
        fruitless = 0 if _size(_part(target)) > before else fruitless + 1
        if fruitless == 0:
            wait = first_wait
        if fruitless >= ATTEMPTS:
            raise _Gone(reason)
        time.sleep(wait)
        wait *= 2


def _once(url: str, target: Path, report: Callable[[Transfer], None]) -> None:
    """One attempt, going on with what is there. Returns when the file is complete."""
    part = _part(target)
    validators = _read_validator(target)
    start = _size(part) if validators.get("url") == url and validators.get("validator") else 0
    headers = {"User-Agent": _AGENT, "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": validators["validator"]}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            error.close()
            if error.headers.get("Content-Range", "").endswith(f"/{start}"):
                return  # nothing was missing
            part.unlink()
            raise _BrokenOff("the server has a shorter file than was fetched; starting afresh") from error
        raise
    with response:
        length = response.headers.get("Content-Length")
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink(missing_ok=True)
            raise _BrokenOff("the server answered with another part of the file; starting afresh")
        total = start + int(length) if length is not None and length.isdecimal() else None
        if start == 0:
            validator = _validator(response.headers)
            _validator_file(target).write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")
        _copy(response, target, start, total, report)


def _copy(response: Any, target: Path, start: int, total: int | None, report: Callable[[Transfer], None]) -> None:
    done = start
    with _report_full_disk(target), _part(target).open("r+b" if start else "wb") as file:
        file.seek(start)
        file.truncate()
        while chunk := _read(response):
            file.write(chunk)
            done += len(chunk)
            report(Transfer(target.name, done, total))
        flush_to_disk(file)
    if total is not None and done < total:
        raise _BrokenOff(f"the connection ended after {done:,} of {total:,} bytes")


def _read(response: Any) -> bytes:
    """What came; read1 hands on what came before a connection broke, which read would lose."""
    try:
        chunk: bytes = response.read1(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOff(str(error) or type(error).__name__) from error
    return chunk


@contextlib.contextmanager
def _report_full_disk(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError.of(
            f"cannot write the download ({error.strerror or error})",
            location=str(_part(target)),
            hint="make room and run again; it goes on from here",
        ) from error


def _validator(headers: http.client.HTTPMessage) -> str | None:
    """What If-Range takes: a strong ETag, or a date."""
    tag = headers.get("ETag")
    if tag and not tag.startswith("W/"):
        return str(tag)
    date = headers.get("Last-Modified")
    return str(date) if date and email.utils.parsedate(date) else None


def _read_validator(target: Path) -> dict[str, str]:
    try:
        found = json.loads(_validator_file(target).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _validator_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.part.json")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
