"""Compares the working tree with another commit: the same numbers, to the last bit, and the same files.

    python -m tests.compatibility.compare COMMIT [--only NAME ...]

Both trees run the same commands in folders of their own, with this interpreter. Losses, gradient norms and learning
rates (all metrics but times and memory) of every configuration in settings.py must be equal bit by bit. Then the
working tree reads what the other commit wrote: a checkpoint (resumed), a dataset with its index maps, an exported
folder and a run directory. Exit code 0: nothing differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.compatibility.settings import BASE, RESUMED, RESUMED_AT, SETTINGS, STEPS, Setting

ROOT = Path(__file__).resolve().parents[2]
MEASURED_TIME = "runtime/"
"""How the names of metrics begin that are times, speeds and memory."""
COMMAND_SECONDS = 900
RESOLVED, MANIFEST = "configs/resolved.json", "manifest.json"
"""Files of a checkpoint: its configuration, and the list of its files."""


@dataclass(frozen=True)
class Tree:
    """One checkout and the folder that its commands write into."""

    name: str
    """In messages."""
    source: Path
    """The checkout."""
    folder: Path
    """Where its commands run."""

    def call(self, *command: str) -> str:
        """Runs a Python file of this checkout and returns its output. Raises RuntimeError where it fails."""
        environment = {**os.environ, "PYTHONPATH": str(self.source), "OMP_NUM_THREADS": "1"}
        self.folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [sys.executable, str(self.source / command[0]), *command[1:]],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(command)} ended with {done.returncode}\n{done.stderr[-4000:]}")
        return done.stdout

    def train(self, name: str, setting: Setting, **keys: Any) -> list[dict[str, float]]:
        """Trains one configuration in a folder of that name and returns its records."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        values = {**BASE, "log_dir": str(folder / "logs"), "save": str(folder / "saved"), **setting.keys, **keys}
        (folder / "run.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        self.call("deepy.py", "train.py", str(folder / "run.json"), "--num-gpus", str(setting.ranks))
        return read_records(folder)


def read_records(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run without what measures time."""
    lines = (folder / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(MEASURED_TIME)} for line in lines
    ]


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """A detached worktree of a commit, removed at the end."""
    git = ["git", "-C", str(ROOT)]
    subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(folder)], check=True)


def difference(old: list[dict[str, float]], new: list[dict[str, float]]) -> str | None:
    """The first value that two runs do not share, or None. A run without losses is an error of the comparison."""
    for records in (old, new):
        if not any("train/lm_loss" in record for record in records):
            raise RuntimeError(f"a run recorded no loss: {records[:2]}")
    if len(old) != len(new):
        return f"{len(old)} records, now {len(new)}"
    for before, after in zip(old, new, strict=True):
        if before != after:
            return f"{before}, now {after}"
    return None


def compare_numbers(old: Tree, new: Tree, names: Sequence[str]) -> list[str]:
    """Trains every configuration in both trees; returns what differs."""
    found = []
    for name in names:
        changed = difference(*(tree.train(name, SETTINGS[name], data_path=str(corpus(old))) for tree in (old, new)))
        found += report(name, changed)
    return found


def report(name: str, changed: str | None) -> list[str]:
    """Prints one line and returns the differences to count."""
    print(
        f"{'same' if changed is None else 'DIFFERS':<8} {name}{'' if changed is None else ': ' + changed}", flush=True
    )
    return [] if changed is None else [name]


def corpus(tree: Tree) -> Path:
    """The prefix of a dataset that the tree's own tool wrote: one token a byte of this repository's documents."""
    prefix = tree.folder / "corpus" / "docs"
    written = prefix.with_name("docs_text_document")
    if not written.with_suffix(".bin").exists():
        prefix.parent.mkdir(parents=True, exist_ok=True)
        text = prefix.with_name("docs.jsonl")
        pages = sorted((ROOT / "configs").rglob("*.yml"))
        text.write_text("\n".join(json.dumps({"text": page.read_text()}) for page in pages), encoding="utf-8")
        options = ("--tokenizer-type", "CharLevelTokenizer", "--append-eod", "--output-prefix", str(prefix))
        tree.call("tools/preprocess_data.py", "--input", str(text), *options)
    return written


def compare_files(old: Tree, new: Tree) -> list[str]:
    """The working tree reads what the other commit wrote; returns what differs."""
    found = report("dataset", _dataset_difference(old, new))
    data, setting = str(corpus(old)), SETTINGS[RESUMED]
    first = {"data_path": data, "train_iters": RESUMED_AT, "lr_decay_iters": STEPS}
    old.train("first half", setting, **first)
    saved = str(old.folder / "first half" / "saved")
    second = {"data_path": data, "lr_decay_iters": STEPS, "load": saved}
    before = old.train("second half", setting, **second)
    maps = _index_maps(Path(data).parent)
    found += report("resumed checkpoint", difference(before, new.train("second half", setting, **second)))
    found += report("index maps", None if _index_maps(Path(data).parent) == maps else "built again")
    found += report("exported folder", _export_difference(old, new, saved))
    found += report("run directory", _run_directory_difference(old, new))
    return found


def _dataset_difference(old: Tree, new: Tree) -> str | None:
    pairs = [(corpus(old).with_suffix(suffix), corpus(new).with_suffix(suffix)) for suffix in (".bin", ".idx")]
    changed = [str(before) for before, after in pairs if before.read_bytes() != after.read_bytes()]
    return ", ".join(changed) or None


def _index_maps(folder: Path) -> dict[str, int]:
    """Every index file beside the dataset with the time of its last change [ns]."""
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}


def _export_difference(old: Tree, new: Tree, saved: str) -> str | None:
    """Both trees export the same checkpoint and import the folder that the old one wrote."""
    exported = [tree.folder / "exported" for tree in (old, new)]
    for tree, folder in zip((old, new), exported, strict=True):
        tree.call("tools/convert_to_hf.py", "--input-dir", saved, "--output-dir", str(folder))
        tree.call(
            "tools/convert_from_hf.py", "--input-dir", str(exported[0]), "--output-dir", str(tree.folder / "back")
        )
    changed = changed_files(*exported) + changed_files(*(tree.folder / "back" for tree in (old, new)))
    return ", ".join(changed) or None


def changed_files(old: Path, new: Path) -> list[str]:
    """Files that the two folders do not share, or whose bytes differ; two empty folders are an error.

    The resolved configuration of a checkpoint may have keys that only the newer tree knows; the manifest, which has the
    sums of all files, is then not compared.
    """
    before, after = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (old, new)
    )
    if not before:
        raise RuntimeError(f"{old} holds no file")
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    grown = {name for name in changed if name.endswith(RESOLVED) and has_all_keys(before.get(name), after.get(name))}
    manifests = {name.removesuffix(RESOLVED) + MANIFEST for name in grown}
    return sorted(changed - grown - manifests)


def has_all_keys(old: bytes | None, new: bytes | None) -> bool:
    """Whether the new configuration has every key of the old one with its value."""
    if old is None or new is None:
        return False
    before, after = json.loads(old), json.loads(new)
    return isinstance(before, dict) and isinstance(after, dict) and before.items() <= after.items()


def _run_directory_difference(old: Tree, new: Tree) -> str | None:
    logs = [str(tree.folder / "second half" / "logs") for tree in (old, new)]
    new.call("tools/compare_runs.py", *logs)
    new.call("tools/plot_metrics.py", *logs, "-o", str(new.folder / "curve.png"))
    return None


def main(arguments: Sequence[str]) -> int:
    """Runs one command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compare the working tree with another commit.")
    parser.add_argument("commit", help="the other commit")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), help="configurations to train (default: all)")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="compare-") as name, checkout(given.commit, Path(name) / "tree") as source:
        old, new = Tree("then", source, Path(name) / "then"), Tree("now", ROOT, Path(name) / "now")
        found = compare_numbers(old, new, given.only or list(SETTINGS))
        if not given.only:
            found += compare_files(old, new)
    print(f"{len(found)} differences" if found else "nothing differs")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
