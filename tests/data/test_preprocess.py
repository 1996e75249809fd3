"""Text to token files: exact contents, the same bytes for any number of workers, and bad input."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron.data.indexed.reader import IndexedDataset
from megatron.data.preprocess.document_types import PlainText
from megatron.data.preprocess.pipeline import preprocess
from megatron.data.preprocess.text_files import find_text_files
from megatron.errors import ConfigError, RunError
from megatron.tokenizer_info import TokenizerInfo
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.trainer import save_tokenizer, train_byte_level_bpe

ROOT = Path(__file__).parents[2]
CHARACTERS = make_tokenizer("CharLevelTokenizer")


def lines(path, records):
    text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    return path


def made(path, prefix, **settings):
    tokenizer = settings.pop("tokenizer", CHARACTERS)
    names = ("keys", "append_eod", "repair", "sentences")
    recipe = settings.pop("recipe", None) or PlainText(
        tokenizer, **{name: settings.pop(name) for name in names if name in settings}
    )
    eod = tokenizer.eod if getattr(recipe, "append_eod", False) else None
    facts = TokenizerInfo("CharLevelTokenizer", tokenizer.vocab_size, eod)
    return preprocess(find_text_files([str(path)]), recipe, output_prefix=str(prefix), facts=facts, **settings)


def texts_of(prefix):
    data = IndexedDataset(prefix)
    data.check()
    return [CHARACTERS.decode(data[item].tolist()) for item in range(len(data))]


def test_documents_in_order(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "first é"}, {"text": "second"}])
    result = made(path, tmp_path / "out", append_eod=True)
    data = IndexedDataset(tmp_path / "out_text_document")
    assert [data[0].tolist(), data[1].tolist()] == [[*"first é".encode(), 0], [*b"second", 0]]
    assert data.dtype == np.uint16
    (written,) = result.outputs
    assert (written.card.documents, written.card.tokens, written.card.text_bytes) == (2, 16, 14)
    assert written.card.eod == 0
    assert json.loads((tmp_path / "out_text_document.json").read_text())["tokens"] == 16


def test_without_the_end_of_documents(tmp_path):
    made(lines(tmp_path / "a.jsonl", [{"text": "ab"}]), tmp_path / "out")
    assert IndexedDataset(tmp_path / "out_text_document")[0].tolist() == [97, 98]


def test_each_key_has_its_own_text(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"question": "q1", "answer": "a1"}, {"question": "q2", "answer": "a2"}])
    made(path, tmp_path / "out", keys=("question", "answer"))
    assert texts_of(tmp_path / "out_question_document") == ["q1", "q2"]
    assert texts_of(tmp_path / "out_answer_document") == ["a1", "a2"]


BAD = [
    {"text": "good"},
    "{broken",
    {"other": "x"},
    {"text": 3},
    {"text": ""},
    "",
    '["a list"]',
    '{"text": "\\ud800"}',
    "[" * 100_000,
    {"text": "also good"},
]


def test_documents_that_have_only_some_of_the_keys_are_reported_as_such(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"a": "x", "b": ""}, {"a": "", "b": "y"}])
    with pytest.raises(RunError, match="2 documents have no text under one of a, b"):
        made(path, tmp_path / "out", keys=("a", "b"))
    path = lines(tmp_path / "b.jsonl", [{"a": "x", "b": ""}, {"a": "p", "b": "q"}])
    assert made(path, tmp_path / "out", keys=("a", "b")).empty == 1
    assert [texts_of(tmp_path / f"out_{key}_document") for key in "ab"] == [["p"], ["q"]]


def test_bad_lines_are_skipped_counted_and_placed(tmp_path):
    path = lines(tmp_path / "a.jsonl", BAD)
    with path.open("ab") as file:
        file.write(b'{"text": "\xff"}\n')
    result = made(path, tmp_path / "out")
    assert texts_of(tmp_path / "out_text_document") == ["good", "also good"]
    assert result.empty == 1
    assert result.skipped.counts == {
        "not JSON": 2,
        "without the key 'text'": 1,
        "whose 'text' is not text": 1,
        "not a JSON object": 1,
        "whose 'text' holds half a surrogate pair": 1,
        "not UTF-8": 1,
    }
    assert result.skipped.examples[0].startswith(f"{path}:2: not JSON")
    assert result.skipped.examples[1].startswith(f"{path}:3: without the key 'text' (its keys: 'other')")


@pytest.mark.parametrize("workers", [1, 2])
def test_strict_ends_at_the_first_bad_line(tmp_path, workers):
    path = lines(tmp_path / "a.jsonl", BAD)
    with pytest.raises(RunError, match=r"a\.jsonl:2: not JSON"):
        made(path, tmp_path / "out", strict=True, workers=workers)
    assert [child.name for child in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_was_cut_short_is_listed_or_ends_the_work(tmp_path, workers):
    """What was whole of it is used, and so is the file behind it."""
    generator = np.random.default_rng(1)
    texts = [generator.bytes(3000).hex() for _ in range(400)]
    full = zstandard.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    (tmp_path / "in").mkdir()
    cut = tmp_path / "in" / "a.jsonl.zst"
    cut.write_bytes(full[: len(full) // 2])
    lines(tmp_path / "in" / "b.jsonl", [{"text": "behind"}])
    result = made(tmp_path / "in", tmp_path / "out", workers=workers)
    *found, last = texts_of(tmp_path / "out_text_document")
    assert last == "behind"
    assert 100 < len(found) < 200
    assert found == texts[: len(found)]
    assert result.skipped.counts == {"damaged": 1}
    (listed,) = [json.loads(line) for line in Path(result.sidecar).read_text().splitlines()]
    assert (listed["file"], listed["line"], listed["reason"]) == (str(cut), 0, "damaged")
    assert f"cannot be read on from byte {len(full) // 2:,} of {len(full) // 2:,}" in listed["detail"]
    with pytest.raises(RunError, match=r"a\.jsonl\.zst: damaged \(it cannot be read on from byte"):
        made(tmp_path / "in", tmp_path / "strict", strict=True, workers=workers)
    assert not list(tmp_path.glob("strict*"))


def test_nothing_but_damage(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(RunError, match=r"no document.*1 damaged"):
        made(tmp_path / "a.jsonl.gz", tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_legacy_format(tmp_path, workers):
    """The same documents, four bytes a token, another index."""
    path = lines(tmp_path / "a.jsonl", [{"text": text} for text in ("one", "two")])
    made(path, tmp_path / "old", legacy=True, append_eod=True, workers=workers)
    made(path, tmp_path / "new", append_eod=True)
    old, new = (IndexedDataset(tmp_path / f"{name}_text_document") for name in ("old", "new"))
    assert (old.legacy, old.dtype, new.dtype) == (True, np.int32, np.uint16)
    assert [old[item].tolist() for item in range(2)] == [new[item].tolist() for item in range(2)]


def test_mended_text(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "schÃ¶n “so”"}, {"text": "\x00"}])
    result = made(path, tmp_path / "out", repair=True)
    assert texts_of(tmp_path / "out_text_document") == ['schön "so"']
    assert result.empty == 1


@pytest.mark.long
@pytest.mark.parametrize("kind", ["jsonl", "txt", "jsonl.zst"])
def test_a_document_of_200_megabytes_fits_into_a_gigabyte(tmp_path, byte_pairs, kind):
    """The peak of the process that encodes it, interpreter and libraries included."""
    line = " ".join(itertools.islice(corpus(), 8)) + " naïve\n"
    text = line * (200_000_000 // len(line.encode()) + 1)
    content = text.encode() if kind == "txt" else json.dumps({"text": text}, ensure_ascii=False).encode()
    path = tmp_path / f"a.{kind}"
    path.write_bytes(zstandard.compress(content) if kind.endswith("zst") else content)
    byte_pairs._tokenizer.save(str(tmp_path / "t.json"))
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(path), "--append-eod"]
    command += ["--output-prefix", str(tmp_path / "out"), "--tokenizer-type", "HFTokenizer"]
    measured = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]).returncode; "
        "print(done, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", measured, *command, "--vocab-file", str(tmp_path / "t.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, kilobytes = map(int, done.stdout.splitlines()[-1].split())
    assert code == 0, done.stderr
    assert kilobytes < 1_000_000
    data = IndexedDataset(tmp_path / "out_text_document")
    assert len(data) == 1
    assert byte_pairs.decode(data[0][:5000].tolist()) == text[: len(byte_pairs.decode(data[0][:5000].tolist()))]
    once = byte_pairs.encode(line)
    assert len(data[0]) == pytest.approx(len(once) * (len(text) // len(line)), rel=1e-3)


def test_a_file_without_documents(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"content": "x"}, {"content": "y"}])
    with pytest.raises(RunError, match=r"no document.*2 without the key 'text'.*'content'"):
        made(path, tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({"workers": 0}, "workers"),
        ({"keys": ()}, "jsonl_keys"),
        ({"keys": ("a", "a")}, "jsonl_keys"),
        ({"keys": ("../a",)}, "jsonl_keys"),
    ],
)
def test_impossible_requests(tmp_path, settings, reported):
    with pytest.raises(ConfigError, match=reported):
        made(lines(tmp_path / "a.jsonl", [{"text": "a"}]), tmp_path / "out", **settings)


def test_a_prefix_that_is_a_directory(tmp_path):
    with pytest.raises(ConfigError, match="output_prefix"):
        made(lines(tmp_path / "a.jsonl", [{"text": "a"}]), f"{tmp_path}/")


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(train_byte_level_bpe(iter(corpus()), 600), path)
    return make_tokenizer("HFTokenizer", vocab_file=str(path))


def corpus():
    generator = np.random.default_rng(0)
    words = ["".join(chr(97 + letter) for letter in generator.integers(0, 26, size)) for size in range(1, 12)]
    for size in generator.integers(1, 4000, 300):
        yield " ".join(words[number] for number in generator.integers(0, len(words), size))


def test_the_same_bytes_for_any_number_of_workers(tmp_path, byte_pairs):
    path = lines(tmp_path / "a.jsonl", [{"text": text} for text in corpus()])
    assert path.stat().st_size > 3 << 20, "several blocks are needed"
    files = {}
    for workers in (1, 2, 3):
        result = made(path, tmp_path / str(workers), tokenizer=byte_pairs, append_eod=True, workers=workers)
        assert result.outputs[0].card.documents == 300
        files[workers] = [
            Path(f"{tmp_path}/{workers}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")
        ]
    assert files[1] == files[2] == files[3]
    data = IndexedDataset(tmp_path / "1_text_document")
    for item, text in zip(range(3), corpus(), strict=False):
        assert data[item].tolist() == [*byte_pairs.encode(text), byte_pairs.eod]


class Fatal:
    """A tokenizer whose worker dies on one document."""

    vocab_size = 512
    eod = 0

    def encode_arrays(self, texts):
        if "die" in texts:
            os._exit(9)
        return [np.array([1]) for _ in texts]


def test_a_worker_that_dies_is_reported(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "die"}])
    with pytest.raises(RunError, match=r"worker process died \(exit code 9\)"):
        made(path, tmp_path / "out", tokenizer=Fatal(), workers=2)
    assert [child.name for child in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("killed", ["one", "all"])
def test_a_killed_worker_ends_the_tool(tmp_path, killed):
    """The tool itself must end, at once and with 1; threads that wait for a worker would hold the interpreter."""
    path = lines(tmp_path / "a.jsonl", [{"text": "some words " * 2000}] * 3000)
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(path)]
    command += ["--output-prefix", str(tmp_path / "out"), "--tokenizer-type", "CharLevelTokenizer", "--workers", "2"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        partial = tmp_path / "out_text_document.bin.partial"
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        listed = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text()
        children = [child for child in map(int, listed.split()) if b"spawn_main" in _command(child)]
        assert len(children) == 2
        for child in children if killed == "all" else children[-1:]:
            os.kill(child, signal.SIGKILL)
        _, reported = running.communicate(timeout=30)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 1
    assert "a worker process died (exit code -9)" in reported and "--resume goes on from there" in reported
    assert "Traceback" not in reported
    assert partial.exists(), "what is done can be gone on with"
    assert not any(_alive(child) for child in children)


def _command(process):
    return Path(f"/proc/{process}/cmdline").read_bytes()


def test_killed_midway_nothing_has_the_final_name_and_no_process_stays(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "some words " * 2000}] * 3000)
    prefix = tmp_path / "out" / "killed"
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(path)]
    command += ["--output-prefix", str(prefix), "--tokenizer-type", "CharLevelTokenizer", "--workers", "2"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        partial = prefix.with_name("killed_text_document.bin.partial")
        deadline = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running.poll() is None, "it must be killed while it works"
        listed = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text()
        children = [int(child) for child in listed.split()]
        assert len(children) >= 2
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert all(child.suffix in {".partial", ".journal"} for child in prefix.parent.iterdir())
    while any(_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(child) for child in children)
    # The next attempt writes over what was left.
    made(lines(tmp_path / "b.jsonl", [{"text": "b"}]), prefix)
    assert texts_of(f"{prefix}_text_document") == ["b"]
    assert not partial.exists()


def _alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_progress_grows_to_the_end(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": text} for text in corpus()])
    seen = []
    made(path, tmp_path / "out", report=seen.append)
    assert len(seen) > 2
    assert [progress.documents for progress in seen] == sorted(progress.documents for progress in seen)
    assert (seen[-1].documents, seen[-1].fraction, seen[-1].content_bytes) == (300, 1.0, path.stat().st_size)
