"""The tool that scores texts and writes those with the lowest scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import filter_texts

TEXTS = ["a fine day", "Zog, zog and a ZOG", "one zog in four", "  ", "zogs are other words"]
SCORES = [0.0, 3 / 5, 1 / 4, 0.0]


def asked(folder: Path, config: str, *flags: str, texts: list[Any] | None = None) -> int:
    (folder / "words.txt").write_text("zog\n\nBAD\n", encoding="utf-8")
    (folder / "scorer.yml").write_text(config, encoding="utf-8")
    lines = [json.dumps({"context": "", "text": text}) for text in (TEXTS if texts is None else texts)]
    (folder / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return filter_texts.main([str(folder / "scorer.yml"), f"--input={folder / 'in.jsonl'}", *flags])


def long_texts(texts: list[str]) -> list[float]:
    """A scorer of a package: a text is the worse, the longer it is."""
    return [len(text) / 100 for text in texts]


def too_few(texts: list[str]) -> list[float]:
    return [0.0]


@pytest.mark.parametrize("words", ["words.txt", "[zog, bad]"])
def test_the_texts_with_the_lowest_scores_are_written(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = f"scorer: words\nwords: {words}\nkeep: 0.5\nthreshold: 0.5\n"
    assert asked(tmp_path, config, f"--output={tmp_path / 'out.jsonl'}") == 0
    said = capsys.readouterr().out
    assert f"4 texts: mean score {sum(SCORES) / 4:.4f}, 1 (25.0%) at 0.5 or above" in said
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found == [{"text": "a fine day", "score": 0.0}, {"text": "zogs are other words", "score": 0.0}]


def test_a_function_of_a_package_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(tmp_path, f"scorer: {__name__}:long_texts\nthreshold: 0.18\n") == 0
    assert "2 (50.0%) at 0.18 or above" in capsys.readouterr().out
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("config", "reported"),
    [
        ("scorer: words\nwords: none.txt", "cannot be read"),
        ("scorer: words\nwords: []", "there is no word"),
        ("scorer: words\nwords: [two words]", "'two words' is no single word"),
        ("scorer: perspective", "this is no scorer"),
        ("scorer: no_such_package:score", "cannot be imported"),
        (f"scorer: {__name__}:too_few", "4 texts got 1 scores"),
        ("scorer: words\nwords: words.txt\nkeep: 0", "above 0, at most 1"),
        ("scorer: words\nwords: words.txt\nkept: 1", "no such key: kept"),
        ("- a", "there are no keys"),
        ("a: [", "this is no YAML"),
    ],
)
def test_what_is_wrong_is_named(config: str, reported: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(tmp_path, config, f"--output={tmp_path / 'out.jsonl'}") == 2
    assert reported in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_an_input_without_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(tmp_path, "scorer: words\nwords: words.txt", texts=["", None]) == 2
    assert "there is no text" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text("{}\n", encoding="utf-8")
    assert filter_texts.main([str(tmp_path / "scorer.yml"), f"--input={tmp_path / 'in.jsonl'}"]) == 2
    assert "in.jsonl, line 1: no JSON object with a text" in capsys.readouterr().err
