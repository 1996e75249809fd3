"""Laws of texts: they name nothing outside the project, and files and commands that pages name exist."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from tests.architecture.source import ROOT

TEXT = (".py", ".md", ".yml", ".yaml", ".toml", ".txt", ".cfg", ".json")
ALSO = ("Makefile", "Dockerfile", ".ci/run", ".pre-commit-config.yaml", ".editorconfig", ".gitignore", ".dockerignore")
LEFT_OUT = frozenset({"runs", "data", "checkpoints", "build", "dist"})  # at the top of the checkout
HERE = "tests/architecture/test_language.py"

# A checkout names neither the machine where it was written nor conversations about it.
LEAKS = (
    (re.compile(r"(?<![\w./~$}-])/(home|root|work|Users)/\w"), "a path of one machine"),
    (re.compile(r"\b(issue|ticket|task|milestone)s?\s+#?\d", re.IGNORECASE), "a numbered piece of work"),
    (re.compile(r"\bas (requested|instructed|discussed)\b", re.IGNORECASE), "a conversation"),
    (re.compile(r"\b(TODO|FIXME|XXX|HACK)\b"), "an unfinished thought; finish it or write down why not"),
    (re.compile(r"\b(workshop|coordinator|subagent|other helpers|co-?worker)\b", re.IGNORECASE), "who wrote it"),
)


def all_files() -> list[str]:
    """Returns every file of the checkout, without the environment and the output of runs."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        parts = Path(folder).relative_to(ROOT)
        folders[:] = [
            name
            for name in folders
            if not (folder == str(ROOT) and name in LEFT_OUT)
            and name != "__pycache__"
            and (not name.startswith(".") or name in {".ci", ".github"})
            and "egg-info" not in name
        ]
        found += [(parts / name).as_posix() for name in names]
    return found


def texts() -> dict[str, str]:
    """Every text file of the project by its path."""
    return {
        name: (ROOT / name).read_text(encoding="utf-8", errors="replace")
        for name in all_files()
        if name.endswith(TEXT) or name in ALSO
    }


def leaks(path: str, text: str) -> list[str]:
    """Returns lines that name something outside the project."""
    if path in {HERE, "LICENSE"}:
        return []
    return [
        f"{path}:{number}: {what}: {line.strip()[:80]}"
        for number, line in enumerate(text.splitlines(), 1)
        for pattern, what in LEAKS
        if pattern.search(line)
    ]


def broken_links(path: str, text: str, exists: Iterable[str]) -> list[str]:
    """Links of a page to files that are not there, and code spans that look like a file of the project and are none."""
    known = set(exists)
    folders = {"/".join(name.split("/")[:depth]) for name in known for depth in range(1, name.count("/") + 1)}
    folder = path.split("/")[:-1]
    found = []
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if re.match(r"[a-z]+:", target):
            continue
        parts = list(folder)
        for part in target.rstrip("/").split("/"):
            parts = parts[:-1] if part == ".." else [*parts, part] if part != "." else parts
        if "/".join(parts) not in known | folders:
            found.append(f"{path}: links to {target}, which is not there")
    named = re.findall(r"`(?:\./)?((?:megatron|tools|tests|docs|configs|requirements|benchmarks)/[\w./-]+)`", text)
    found += [f"{path}: names {name}, which is not there" for name in named if name.rstrip("/") not in known | folders]
    return found


def missing_on_the_map(text: str, exists: Iterable[str]) -> list[str]:
    """Files and folders that a row of the map names and megatron/ does not have.

    A name without a folder is beside one that the row has named before.
    """
    known = set(exists)
    known |= {"/".join(name.split("/")[:depth]) + "/" for name in known for depth in range(1, name.count("/") + 1)}
    found = []
    for line in text.splitlines():
        if not line.startswith("|"):
            continue
        folders = ["megatron/", ""]
        for name in re.findall(r"`([\w./]+(?:\.py|/))`", line):
            there = [folder for folder in folders if folder + name in known]
            if there:
                path = there[-1] + name
                folders += [path if path.endswith("/") else path.rpartition("/")[0] + "/"]
            else:
                found.append(f"the map names {name}, which is not there")
    return found


def unknown_commands(path: str, text: str, makefile: str) -> list[str]:
    """`make` targets of a page that the Makefile does not have."""
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    targets_named = re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)
    return [f"{path}: make {name} does not exist" for name in targets_named if name not in targets]


def pages() -> dict[str, str]:
    return {path: text for path, text in texts().items() if path.endswith(".md")}


def test_the_project_names_nothing_outside_itself() -> None:
    found = texts()
    assert {
        "README.md",
        "Makefile",
        ".ci/run",
        "megatron/data/dataset/gpt_dataset.py",
        "configs/quickstart.yml",
    } <= found.keys()
    assert [line for path, text in found.items() for line in leaks(path, text)] == []


def test_leak_law_can_complain() -> None:
    assert leaks("a.md", "see /home/alice/notes\n")
    assert leaks("a.py", "# for issue 12\n")
    assert leaks("a.py", "# TODO: later\n")
    assert leaks("a.md", "as requested, the default is 2\n")
    assert leaks("a.md", "make PYTHON=/path/to/python; tests/work/x; the task needs 12 steps\n") == []


def test_pages_link_to_what_exists() -> None:
    files = all_files()
    assert [line for path, text in pages().items() for line in broken_links(path, text, files)] == []


def test_link_law_can_complain() -> None:
    files = ["docs/a.md", "docs/images/a.png", "tools/b.py"]
    assert broken_links("docs/a.md", "[b](b.md)", files)
    assert broken_links("docs/a.md", "[b](../megatron/)", files)
    assert broken_links("README.md", "run `tools/c.py`", files)
    assert (
        broken_links("docs/a.md", "[b](../tools/b.py) [i](images/a.png) [w](https://a.b) `./tools/b.py`", files) == []
    )


def test_the_map_names_what_exists() -> None:
    assert missing_on_the_map(pages()["megatron/README.md"], all_files()) == []


def test_map_law_can_complain() -> None:
    files = ["megatron/data/dataset/gpt_dataset.py", "megatron/data/dataset/blend.py", "tools/a.py"]
    assert missing_on_the_map("| a | `data/rules.py` |", files)
    assert missing_on_the_map("| a | `blend.py` |", files)
    assert missing_on_the_map("| a | `rules/` |", files)
    assert missing_on_the_map("| a | `data/dataset/gpt_dataset.py`, `blend.py`, `tools/a.py`; `data/` |", files) == []


def test_pages_name_commands_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    texts_of_pages = pages()
    assert "make quickstart" in texts_of_pages["README.md"]
    assert [line for path, text in texts_of_pages.items() for line in unknown_commands(path, text, makefile)] == []


def test_command_law_can_complain() -> None:
    makefile = "test: install\n\tpytest\n"
    assert unknown_commands("a.md", "run `make bread`", makefile)
    assert unknown_commands("a.md", "make bread\n", makefile)
    assert unknown_commands("a.md", "run `make test`; to make sure", makefile) == []
