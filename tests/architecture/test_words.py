"""Laws of words: one word a concept, as docs/glossary.md lists them, and no name for two classes."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Sequence

from tests.architecture.source import PROJECT, ROOT, Source, sample
from tests.architecture.test_language import pages

GLOSSARY = "docs/glossary.md"
UNREAD = (GLOSSARY, "CHANGELOG.md")
HERE = "tests/architecture/test_words.py"


def words_not_to_use(page: str) -> tuple[frozenset[str], frozenset[str]]:
    """The words that the glossary leaves out: of identifiers, and of sentences, in lower case."""
    names = re.search(r"^Not in names: (.*?)\.$", page, re.MULTILINE | re.DOTALL)
    prose = re.search(r"^Not in sentences: (.*?)\.$", page, re.MULTILINE | re.DOTALL)
    assert names, "the glossary has no paragraph `Not in names: ...`"
    assert prose, "the glossary has no paragraph `Not in sentences: ...`"
    return tuple(frozenset(re.findall(r"`(\w+)`", found[1])) for found in (names, prose))  # type: ignore[return-value]


def parts(name: str) -> set[str]:
    """The words of an identifier: `_toldRank_of` -> told, rank, of."""
    return {part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def identifiers(source: Source) -> Iterator[tuple[str, ast.AST]]:
    """Every name that the file defines: modules, classes, functions, parameters, fields and variables."""
    yield source.path.removesuffix(".py").split("/")[-1], source.tree
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.arg):
            yield node.arg, node
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node


def name_complaints(source: Source, private: frozenset[str]) -> list[str]:
    """Identifiers that hold a word of the list."""
    found = {
        source.complaint(node, f"the name {name} has {', '.join(sorted(parts(name) & private))}")
        for name, node in identifiers(source)
        if parts(name) & private
    }
    return sorted(found)


def sentences(source: Source) -> Iterator[tuple[int, str]]:
    """Comments, docstrings and string literals with a space in them, as lines with their numbers."""
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        spoken = token.type == tokenize.STRING and " " in token.string
        if token.type == tokenize.COMMENT or spoken:
            for number, line in enumerate(token.string.splitlines(), token.start[0]):
                yield number, re.sub(r"\{[^}]*\}|`[^`]*`", "", line)


def sentence_complaints(path: str, lines: Iterator[tuple[int, str]], private: frozenset[str]) -> list[str]:
    """Sentences that hold a word of the list."""
    return [
        f"{path}:{number}: says {', '.join(sorted(held))}: {line.strip()[:90]}"
        for number, line in lines
        if (held := set(re.findall(r"[a-z]+", line.lower())) & private)
    ]


def page_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a page without code."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield number, re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)


def twice(sources: Sequence[Source]) -> list[str]:
    """Classes of the framework that share their name."""
    places: dict[str, list[str]] = {}
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{source.path}:{node.lineno}")
    return [
        f"class {name} is defined in {', '.join(found)}" for name, found in sorted(places.items()) if len(found) > 1
    ]


def checked() -> list[Source]:
    return [source for source in PROJECT if source.path != HERE]


def glossary() -> str:
    return (ROOT / GLOSSARY).read_text(encoding="utf-8")


def test_names_use_the_words_of_the_glossary() -> None:
    private, _ = words_not_to_use(glossary())
    assert [complaint for source in checked() for complaint in name_complaints(source, private)] == []


def test_sentences_use_the_words_of_the_glossary() -> None:
    _, private = words_not_to_use(glossary())
    found = [line for source in checked() for line in sentence_complaints(source.path, sentences(source), private)]
    for path, text in pages().items():
        if path not in UNREAD:
            found += sentence_complaints(path, page_lines(text), private)
    assert found == []


def test_no_two_classes_share_a_name() -> None:
    assert twice([source for source in PROJECT if source.path.startswith("megatron/")]) == []


def test_word_laws_can_complain() -> None:
    private = frozenset({"told", "remedy"})
    assert name_complaints(sample("megatron/a.py", "def _who_told(x): pass\n"), private)
    assert name_complaints(sample("megatron/told.py", ""), private)
    assert name_complaints(sample("megatron/a.py", "class ToldRanks: pass\n"), private)
    assert name_complaints(sample("megatron/a.py", "x.told = 1\n"), private)
    assert name_complaints(sample("megatron/a.py", "def f(remedy=1): pass\n"), private)
    assert name_complaints(sample("megatron/a.py", "untold = 1\n"), private) == []
    for text in ('"""The remedy is told."""\n', "x = 1  # was told\n", 'x = f"nobody told {x}"\n'):
        assert sentence_complaints("a.py", sentences(sample("megatron/a.py", text)), private)
    assert sentence_complaints("a.py", sentences(sample("megatron/a.py", 'x = "`told` is a key"\n')), private) == []
    assert sentence_complaints("a.md", page_lines("It is told.\n"), private)
    assert sentence_complaints("a.md", page_lines("```\ntold\n```\n`told`\n"), private) == []
    same = sample("megatron/a.py", "class A: pass\n")
    assert twice([same, sample("megatron/b.py", "class A: pass\n")]) == [
        "class A is defined in megatron/a.py:1, megatron/b.py:1"
    ]
    assert twice([same]) == []
