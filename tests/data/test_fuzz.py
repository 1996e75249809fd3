"""Broken JSON lines of every kind: what is text becomes tokens, the rest is listed, nothing crashes or is lost."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.indexed.reader import IndexedDataset
from megatron.data.preprocess.document_types import PlainText
from megatron.data.preprocess.pipeline import preprocess
from megatron.data.preprocess.text_files import find_text_files
from megatron.errors import RunError
from megatron.tokenizer_info import TokenizerInfo
from megatron.tokenizers import make_tokenizer

CHARACTERS = make_tokenizer("CharLevelTokenizer")
FACTS = TokenizerInfo("CharLevelTokenizer", 512, 0)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.dictionaries(st.sampled_from(["text", "Text", "meta"]), VALUES, max_size=3)
GOOD = st.text(max_size=30).map(lambda text: {"text": text})
ODD = st.sampled_from(
    [
        b"{",
        b'{"text": "\\ud800"}',
        b'{"text": "a", "text": "b"}',
        b'{"text": 1e999999}',
        b'{"text": NaN}',
        b"[" * 3000,
        b'{"a":' * 3000,
        b'{"text": "' + b"9" * 50,
        b"1" * 6000,
        b'\xef\xbb\xbf{"text": "mark"}',
        b'\xff\xfe{\x00"\x00',
        b'{"text": "\x00"}',
        b'{"text": "\\u0000"}',
        b"null",
        b"\x00",
        b" \t\r",
        b'{"text": "a"}\r',
        b'{"text": "\xed\xa0\x80"}',
        b'{"text": "\xf4\x90\x80\x80"}',
    ]
)


@st.composite
def lines(draw):
    """Lines of a file: whole records, records with bytes changed, and anything."""
    made = []
    for kind in draw(st.lists(st.sampled_from("gggrrdoo*"), min_size=1, max_size=12)):
        if kind == "*":
            line = draw(st.binary(max_size=40))
        elif kind == "o":
            line = draw(ODD)
        else:
            line = json.dumps(draw(GOOD if kind == "g" else RECORDS), ensure_ascii=draw(st.booleans())).encode(
                "utf-8", "surrogatepass"
            )
        if kind == "d" and line:
            position = draw(st.integers(0, len(line) - 1))
            line = line[:position] + draw(st.binary(max_size=2)) + line[position + draw(st.integers(0, 2)) :]
        made.append(line.replace(b"\n", b""))
    return made


def expected(line):
    """The text of a line, "" for one without, None where it must be listed."""
    if not line.strip(b" \t\r\n\x0b\x0c"):
        return ""
    try:
        record = json.loads(line.decode("utf-8"))
        record["text"].encode("utf-8")
        return record["text"] if isinstance(record, dict) else None
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None


@settings(max_examples=300, deadline=None)
@given(made=lines(), last=st.booleans())
def test_no_line_crashes_the_reader_or_is_lost(tmp_path_factory, made, last):
    folder = tmp_path_factory.mktemp("text")
    path = folder / "a.jsonl"
    path.write_bytes((b"\n".join(made) + (b"\n" if last else b"")) or b"\n")
    if made[0].startswith(b"\xef\xbb\xbf"):
        made[0] = made[0].removeprefix(b"\xef\xbb\xbf")  # at the start of a file it is a byte order mark
    texts = [expected(line) for line in made]
    bad = [number for number, text in enumerate(texts, 1) if text is None]
    target = find_text_files([str(path)]), PlainText(CHARACTERS)
    if not any(texts):
        with pytest.raises(RunError, match="there is no document"):
            preprocess(*target, output_prefix=str(folder / "out"), facts=FACTS)
        return
    result = preprocess(*target, output_prefix=str(folder / "out"), facts=FACTS)
    data = IndexedDataset(folder / "out_text_document")
    data.check()
    assert [CHARACTERS.decode(data[item].tolist()) for item in range(len(data))] == [text for text in texts if text]
    assert result.skipped.total == len(bad)
    listed = [json.loads(line)["line"] for line in Path(result.sidecar).read_text().splitlines()] if bad else []
    assert listed == bad
