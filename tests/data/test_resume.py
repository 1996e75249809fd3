"""A work that was killed goes on where it stopped, and ends with the bytes of one that was not."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.data.preprocess.document_types import PlainText
from megatron.data.preprocess.pipeline import preprocess
from megatron.data.preprocess.sentences import Sentences
from megatron.data.preprocess.text_files import find_text_files
from megatron.errors import ConfigError
from megatron.tokenizer_info import TokenizerInfo
from megatron.tokenizers import make_tokenizer

ROOT = Path(__file__).parents[2]
CHARACTERS = make_tokenizer("CharLevelTokenizer")
FACTS = TokenizerInfo("CharLevelTokenizer", 512, 0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """About six blocks with a broken line now and then, plain and compressed."""
    import gzip

    folder = tmp_path_factory.mktemp("text")
    for name in ("a.jsonl", "b.jsonl.gz"):
        lines = [json.dumps({"text": f"Words {number}. " * 500}) if number % 50 else "broken" for number in range(400)]
        content = "\n".join(lines).encode()
        (folder / name).write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    return find_text_files([str(folder)])


def work(files, prefix, *, sentences=None, **settings):
    recipe = PlainText(CHARACTERS, append_eod=True, sentences=sentences)
    return preprocess(files, recipe, output_prefix=str(prefix), facts=FACTS, mark_interval=0.0, **settings)


def stop_after(blocks):
    seen = []

    def report(progress):
        seen.append(progress)
        if len(seen) == blocks:
            raise KeyboardInterrupt

    return report


def result(folder, name):
    return {path.name.removeprefix(name): path.read_bytes() for path in Path(folder).glob(f"{name}*")}


@pytest.fixture(scope="module")
def at_one_go(tmp_path_factory, files):
    """By whether sentences are split: what work without a stop reports, and its files."""
    made = {}
    for sentences in (None, Sentences()):
        folder = tmp_path_factory.mktemp("once")
        report = work(files, folder / "once", sentences=sentences)
        made[sentences is not None] = report, result(folder, "once")
    return made


@pytest.mark.parametrize("sentences", [None, Sentences()])
@pytest.mark.parametrize("stops", [[1], [3], [2, 2]])
def test_the_same_bytes(tmp_path, files, at_one_go, stops, sentences):
    once, expected = at_one_go[sentences is not None]
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            work(files, tmp_path / "late", sentences=sentences, resume=True, report=stop_after(stop))
        assert not list(tmp_path.glob("late*.idx"))
    seen = []
    late = work(files, tmp_path / "late", sentences=sentences, resume=True, report=seen.append)
    assert late.content_bytes < once.content_bytes, "it must not do everything again"
    assert result(tmp_path, "late") == expected
    assert late.skipped.counts == once.skipped.counts == {"not JSON": 16}
    listed = [json.loads(line) for line in Path(late.sidecar).read_text().splitlines()]
    assert [(Path(record["file"]).name, record["line"]) for record in listed] == [
        (name, number) for name in ("a.jsonl", "b.jsonl.gz") for number in range(1, 401, 50)
    ]


def test_what_was_written_after_the_last_mark_is_cut_off(tmp_path, files, at_one_go):
    with pytest.raises(KeyboardInterrupt):
        work(files, tmp_path / "late", resume=True, report=stop_after(2))
    for partial in tmp_path.glob("late*.partial"):
        with partial.open("ab") as file:
            file.write(b"half a block")
    work(files, tmp_path / "late", resume=True)
    assert result(tmp_path, "late") == at_one_go[False][1]


def test_another_task_is_not_gone_on_with(tmp_path, files):
    with pytest.raises(KeyboardInterrupt):
        work(files, tmp_path / "late", resume=True, report=stop_after(2))
    with pytest.raises(ConfigError, match="other input files"):
        work(files[:1], tmp_path / "late", resume=True)
    with pytest.raises(ConfigError, match="other options"):
        work(files, tmp_path / "late", resume=True, sentences=Sentences())


def test_without_the_request_it_starts_afresh(tmp_path, files, at_one_go):
    once, _ = at_one_go[False]
    with pytest.raises(KeyboardInterrupt):
        work(files, tmp_path / "late", report=stop_after(2))
    assert work(files, tmp_path / "late").content_bytes == once.content_bytes
    assert result(tmp_path, "late") == at_one_go[False][1]


def test_nothing_to_resume_is_a_fresh_start(tmp_path, files, at_one_go):
    work(files, tmp_path / "late", resume=True)
    assert result(tmp_path, "late") == at_one_go[False][1]


def slow_work(prefix, *names):
    """Run in a process of its own, which is killed: a fifth of a second a block."""
    work(find_text_files(names), prefix, report=lambda progress: time.sleep(0.2))


def blocks_of(journal):
    return json.loads(journal.read_text())["counts"]["blocks"] if journal.exists() else 0


def test_killed_for_good(tmp_path, files, at_one_go):
    """No code of the first attempt runs when it ends."""
    once, _ = at_one_go[False]
    code = "import sys; from tests.data.test_resume import slow_work; slow_work(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(tmp_path / "late"), *(str(file.path) for file in files)]
    running = subprocess.Popen(command, cwd=ROOT)
    journal = tmp_path / "late_preprocess.journal"
    try:
        while running.poll() is None and blocks_of(journal) < 2:
            time.sleep(0.01)
        assert running.poll() is None, "it must be killed while it works"
    finally:
        running.kill()
        running.wait()
    late = work(files, tmp_path / "late", resume=True)
    assert late.content_bytes < once.content_bytes
    assert result(tmp_path, "late") == at_one_go[False][1]
