"""Bits per byte: every token once, the definition, and what the compressors themselves give."""

import gzip
import json
import lzma
import math
import shutil
import subprocess

import numpy
import pytest
import torch

from megatron.distributed.mesh import Topology
from megatron.errors import ConfigError
from megatron.evaluation import runner
from megatron.evaluation.bits_per_byte import BitsPerByte, comparison, compressors, measure, read_documents
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.char_level import CharLevelTokenizer
from tests.inference.small_model import SEQUENCE, SmallEngine, small_config

DOCUMENTS = ["A first document, somewhat longer than the model's context. " * 3, "zwei: größer", "x"]


class Uniform:
    """Finds every token equally likely, so that the measure is known without a model."""

    def logits(self, tokens, cache=None, at=None):
        return torch.zeros(*tokens.shape, 512) if at is None else torch.zeros(len(at), 512)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_uniform_model_needs_nine_bits_a_token(batch_size):
    found = measure(Uniform(), CharLevelTokenizer(), DOCUMENTS, max_length=16, batch_size=batch_size)
    size = sum(len(document.encode()) for document in DOCUMENTS)
    tokens = size + len(DOCUMENTS)  # a byte a token, and the end of each document
    assert found.tokens == tokens
    assert found.bytes == size
    assert found.bits_per_byte == pytest.approx(9 * tokens / size, rel=1e-6)


def test_a_document_that_fits_is_its_plain_log_likelihood():
    engine = SmallEngine(small_config())
    text = "fits in one window"
    found = measure(engine, CharLevelTokenizer(), [text], max_length=SEQUENCE, batch_size=2)
    tokens = [0, *text.encode(), 0]
    rows = engine.logits(torch.tensor([tokens[:-1]]))[0].detach().double().numpy()
    logs = rows - rows.max(1, keepdims=True)
    logs -= numpy.log(numpy.exp(logs).sum(1, keepdims=True))
    expected = -sum(logs[at, token] for at, token in enumerate(tokens[1:]))
    assert found.nats == pytest.approx(expected, rel=1e-6)


def test_replicas_together_measure_what_one_does():
    engine = SmallEngine(small_config())
    arguments = {"max_length": SEQUENCE, "batch_size": 3}
    alone = measure(engine, CharLevelTokenizer(), DOCUMENTS, **arguments)
    parts = [
        measure(engine, CharLevelTokenizer(), DOCUMENTS, **arguments, share=(number, 3)).nats for number in range(3)
    ]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(alone.nats, rel=1e-6)


def test_the_compressors_are_the_command_line_tools():
    data = "".join(DOCUMENTS).encode()
    found = compressors(DOCUMENTS)
    assert found["gzip -9"] == pytest.approx(8 * len(gzip.compress(data, 9)) / len(data))
    assert found["xz -9e"] == pytest.approx(8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data))
    for name, bits in found.items():
        if shutil.which(name.split()[0]):
            packed = subprocess.run([*name.split(), "-c"], input=data, capture_output=True, check=True).stdout
            assert bits == pytest.approx(8 * len(packed) / len(data), rel=0.02)


def test_documents_of_plain_and_jsonl_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert read_documents(str(tmp_path / "a.txt")) == ["one\ntwo\n"]
    lines = [json.dumps({"text": text}) for text in ("one", "", "line\u2028separator")]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    assert read_documents(str(tmp_path / "b.jsonl")) == ["one", "line\u2028separator"]
    for name, text in (("a.txt", "one\n"), ("b.jsonl", lines[0])):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_documents(str(tmp_path / name))[0].strip() == "one"


@pytest.mark.parametrize(
    ("name", "content", "reported"),
    [
        ("a.txt", None, "No such file"),
        ("a.txt", b"", "no text"),
        ("a.txt", b"\xff\xff", "UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"body": 1}\n', "a.jsonl:2"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1"),
        ("a.jsonl", b'{"text": 3}\n', "no string"),
    ],
)
def test_unusable_texts_are_the_users_issue(tmp_path, name, content, reported):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=reported):
        read_documents(str(tmp_path / name))


def test_the_comparison_shows_all_figures():
    text = comparison(BitsPerByte(math.log(2) * 300, 75, 150), {"gzip -9": 2.5}, 2)
    assert "2.0000 bits per byte" in text and "gzip -9   2.5000" in text and "75 tokens" in text


@pytest.mark.parametrize("program", [runner.measure_text, runner.measure_perplexity])
@pytest.mark.parametrize("lossy", [True, False])
def test_a_tokenizer_that_loses_text_is_reported_beside_the_figures(program, lossy, tmp_path, monkeypatch, caplog):
    """Lost bytes cost no bits and are counted all the same."""
    text = tmp_path / "text.txt"
    text.write_text("a  b\n")
    tokenizer = CharLevelTokenizer()
    if lossy:
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
        (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
        tokenizer = make_tokenizer("BertWordPieceLowerCase", vocab_file=str(tmp_path / "vocab.txt"))
    config = small_config(eval_text=str(text), log_dir=str(tmp_path))
    monkeypatch.setattr(runner, "with_loaded_model", lambda _, work: work(Uniform(), tokenizer, Topology.single()))
    with caplog.at_level("WARNING"):
        program(config)
    reported = [record.getMessage() for record in caplog.records if "does not keep every text" in record.getMessage()]
    assert len(reported) == lossy
    assert all("repeated blanks" in line for line in reported)
