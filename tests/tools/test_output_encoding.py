"""Programs that print texts where the output cannot have all characters: escapes, and no UnicodeEncodeError."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed.writer import DatasetWriter

ROOT = Path(__file__).parents[2]


def test_every_tool_escapes_characters_that_its_output_lacks() -> None:
    programs = [path for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    ways = (r"escape_characters\(\)", r".*\(run_tool\(", r"sys\.exit\(worker_main\(", r".*backslashreplace")
    prepared = re.compile(rf"^    (?:{'|'.join(ways)})", re.MULTILINE)
    assert len(programs) > 20
    assert [path.name for path in programs if not prepared.search(path.read_text(encoding="utf-8"))] == []


def test_a_tool_needs_no_standard_error(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n')
    arguments = "--input in.jsonl --output-prefix out --tokenizer-type CharLevelTokenizer --workers 1"
    command = f"exec {sys.executable} {ROOT / 'tools' / 'preprocess_data.py'} {arguments} 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False).returncode == 0
    assert (tmp_path / "out_text_document.idx").is_file()


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one two three"}\n')
    (tmp_path / "file").write_text("")
    tools = {
        "preprocess_data.py": "--input in.jsonl --output-prefix file/out --tokenizer-type CharLevelTokenizer",
        "train_tokenizer.py": "--input in.jsonl --vocab-size 270 --tokenizer-output-path file/out.json",
    }
    for name, arguments in tools.items():
        command = [sys.executable, str(ROOT / "tools" / name), *arguments.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode in (1, 2)
        (line,) = done.stderr.strip().splitlines()
        assert "file" in line and "cannot be read or written" in line, line


@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}],
    ids=["ascii", "C locale"],
)
def test_a_document_is_printed_with_escapes(variables: dict[str, str], tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "made", np.dtype(np.uint16)) as writer:
        writer.add_document(list("aé".encode()))
    shown = ("--tokenizer-type", "CharLevelTokenizer", "--document", "0")
    found = subprocess.run(
        [sys.executable, ROOT / "tools" / "inspect_dataset.py", tmp_path / "made", *shown],
        env={**os.environ, "PYTHONIOENCODING": "", **variables},
        capture_output=True,
        check=False,
    )
    assert (found.returncode, found.stdout.splitlines()[-1]) == (0, b"a\\xe9"), found.stderr
