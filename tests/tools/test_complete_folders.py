"""A folder of transformers is imported and exported completely: tokenizer, end ids, sampling, templates, rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer

from megatron.checkpoint.format import files, integrity, layout
from megatron.checkpoint.format.files import Written
from megatron.checkpoint.load.vocabulary import vocabulary_rows
from megatron.config import Resources, resolve, serialize
from megatron.errors import ConfigError
from megatron.inference.runner import generate
from megatron.tokenizers import make_tokenizer
from tests.checkpoint.huggingface.tokenized import EXPECTED, FOLDERS, SAMPLES, gpt2_files, sentence_piece, write_model
from tools import convert_from_hf, convert_to_hf

Keys = dict[str, Any]


def taken_over(name: str, folder: Path) -> tuple[Path, Keys]:
    """Our save folder and its model.yml."""
    FOLDERS[name](folder / "theirs")
    return take_over(folder)


def take_over(folder: Path) -> tuple[Path, Keys]:
    assert convert_from_hf.main(["--input-dir", str(folder / "theirs"), "--output-dir", str(folder / "ours")]) == 0
    return folder / "ours", yaml.safe_load((folder / "ours" / "model.yml").read_text())


def tokenizer_of(keys: Keys) -> Any:
    return make_tokenizer(keys["tokenizer_type"], vocab_file=keys["vocab_file"], merge_file=keys.get("merge_file"))


class Taken(NamedTuple):
    """A folder of transformers that was taken over; tests only read it."""

    name: str
    theirs: Path
    ours: Path
    keys: Keys


@pytest.fixture(scope="module", params=FOLDERS)
def taken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    folder = tmp_path_factory.mktemp("taken")
    return Taken(request.param, folder / "theirs", *taken_over(request.param, folder))


def test_the_keys_report_tokenizer_ends_and_sampling(taken: Taken) -> None:
    """With the HFTokenizer that was written before, all of these refuse or end at another token."""
    name, _, _, keys = taken
    kind, end, ends, sampling = EXPECTED[name]
    assert keys["tokenizer_type"] == kind
    tokenizer = tokenizer_of(keys)
    named = tokenizer.special_tokens
    assert tokenizer.eod == named[end]
    assert keys["eos_token_ids"] == [named[each] for each in ends]
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "maximum_tokens")
    assert {key: keys[key] for key in names if key in keys} == sampling


@pytest.mark.parametrize("reported", ["\n\n", ["User:", "###"]])
def test_the_folders_stop_texts_end_what_is_generated(reported: Any, tmp_path: Path) -> None:
    FOLDERS["llama 3"](tmp_path / "theirs")
    (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps({"stop_strings": reported}))
    assert take_over(tmp_path)[1]["stop"] == ([reported] if isinstance(reported, str) else reported)


def test_a_prompt_has_the_ids_of_transformers(taken: Taken) -> None:
    """Tokens that files add to a vocabulary are no text: without them the marks of a chat template are spelt out."""
    name, folder, _, keys = taken
    reader = GPT2Tokenizer if name == "gpt2 files" else AutoTokenizer  # which needs a file with the class
    tokenizer, theirs = tokenizer_of(keys), reader.from_pretrained(folder)
    marks = [token for token in ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "</s>") if token in theirs.get_vocab()]
    for text in ["the quick brown fox", "Hello world, 42 and more", *(f"{mark}user\nhi{mark}" for mark in marks)]:
        read = [*tokenizer.prefix_ids, *tokenizer.encode_with_special_tokens(text)]
        assert read == theirs.encode(text), text


def test_a_model_file_is_all_that_generation_needs(taken: Taken, tmp_path: Path) -> None:
    _, _, ours, keys = taken
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("the quick\nHello world\n")
    reported = {"load": str(ours), "sample_input_file": str(prompts), "sample_output_file": str(output)}
    reported |= {"maximum_tokens": 4, "user_script": "generate.py"}
    config = resolve([str(ours / "model.yml")], reported, Resources(1)).config
    assert config.model.seq_length == keys["max_position_embeddings"]
    assert generate(config) is None or output.is_file()
    assert len(output.read_text().splitlines()) == 2


def test_what_goes_back_out_is_read_as_it_was(taken: Taken, tmp_path: Path) -> None:
    """Rows, logits, ids of texts, ends and begins, templates, and a class that every release knows."""
    name, theirs, ours, keys = taken
    back = tmp_path / "back"
    assert convert_to_hf.main(["--input-dir", str(ours), "--output-dir", str(back)]) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (theirs, back))
    ids = torch.tensor([[5, 9, 13, 100, 7]])
    torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=0, atol=0)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(after.config, key) == getattr(before.config, key), key
        assert getattr(after.generation_config, key) == getattr(before.generation_config, key), key
    assert json.loads((back / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    written, ours_read = AutoTokenizer.from_pretrained(back), tokenizer_of(keys)
    for text in SAMPLES:
        read = ours_read.encode_with_special_tokens(text)
        assert written.encode(text, add_special_tokens=False) == read, text
        assert written.encode(text)[-1:] == read[-1:], "nothing is put behind a text"
    assert written.eos_token_id == ours_read.eod
    if name in ("llama 3", "chat markers"):
        assert "messages" in str(written.chat_template)


def test_begin_is_put_before_a_text_where_the_class_did(tmp_path: Path) -> None:
    for reported, begin in (({}, [1]), ({"add_bos_token": False}, [])):
        folder = tmp_path / str(len(begin))
        sentence_piece(folder / "theirs", **reported)
        ours, keys = take_over(folder)
        assert convert_to_hf.main(["--input-dir", str(ours), "--output-dir", str(folder / "back")]) == 0
        plain = tokenizer_of(keys).encode(SAMPLES[0])
        assert AutoTokenizer.from_pretrained(folder / "back").encode(SAMPLES[0]) == begin + plain


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_a_tokenizer_file_alone_says_what_is_before_a_text(flags: Keys, kind: str, tmp_path: Path) -> None:
    """Release 5 takes no notice of the flags beside it, nor do we; an export that heeds them changes every prompt."""
    FOLDERS["llama 3"](tmp_path / "theirs")
    full = tmp_path / "theirs" / "tokenizer.json"
    for adds in (False, True):
        if adds:
            content = json.loads(full.read_text())
            begin = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
            single, pair = (
                [begin, *({"Sequence": {"id": name, "type_id": 0}} for name in names)] for names in ("A", "AB")
            )
            (number,) = (each["id"] for each in content["added_tokens"] if each["content"] == "<|begin_of_text|>")
            known = {"<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [number], "tokens": ["<|begin_of_text|>"]}}
            content["post_processor"] = {
                "type": "TemplateProcessing",
                "single": single,
                "pair": pair,
                "special_tokens": known,
            }
            full.write_text(json.dumps(content))
        reported = {"tokenizer_class": kind, "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", **flags}
        (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(reported))
        folder = tmp_path / str(adds)
        folder.mkdir()
        (folder / "theirs").symlink_to(tmp_path / "theirs")
        ours, keys = take_over(folder)
        assert convert_to_hf.main(["--input-dir", str(ours), "--output-dir", str(folder / "back")]) == 0
        read = [*tokenizer_of(keys).prefix_ids, *tokenizer_of(keys).encode("Hello")]
        assert len(tokenizer_of(keys).prefix_ids) == adds
        assert AutoTokenizer.from_pretrained(folder / "back").encode("Hello") == read
        assert AutoTokenizer.from_pretrained(folder / "theirs").encode("Hello") == read


def seal(directory: Path) -> None:
    """Lists a changed checkpoint's files anew."""
    (directory / layout.MANIFEST).unlink()
    paths = [path for path in directory.rglob("*") if path.is_file()]
    integrity.write_manifest(directory, [Written(path, path.stat().st_size, files.digest(path)) for path in paths])


def trained(folder: Path, rows: int, **tokenizer: Any) -> Path:
    """A checkpoint as a run writes it, with rows of padding: no vocab_size, no ids of ends."""
    write_model(folder / "theirs", rows, eos_token_id=None, bos_token_id=None)
    ours, keys = take_over(folder)
    reported = {key: value for key, value in keys.items() if key not in ("vocab_size", "eos_token_ids")}
    config = resolve([], {**reported, **tokenizer, "user_script": "generate.py"}, Resources(1)).config
    files.write_text(ours / "global_step0" / layout.RESOLVED, serialize.to_json(config))
    seal(ours / "global_step0")
    return ours


@pytest.mark.parametrize("reported", [True, False])
@pytest.mark.parametrize("arguments", [[], ["--no-save-tokenizer"]])
def test_padding_stays_behind(reported: bool, arguments: list[str], tmp_path: Path) -> None:
    """By what the run kept of its tokenizer, and without that by the tokenizer's own files."""
    gpt2_files(tmp_path / "files")
    vocabulary = len(json.loads((tmp_path / "files" / "vocab.json").read_text()))
    names = {"vocab_file": str(tmp_path / "files" / "vocab.json"), "merge_file": str(tmp_path / "files" / "merges.txt")}
    ours = trained(tmp_path, 512, tokenizer_type="GPT2BPETokenizer", **names)
    if reported:
        facts = {"tokenizer": {"tokenizer_type": "GPT2BPETokenizer", "vocab_size": vocabulary, "eod": 0}}
        files.write_json(ours / "global_step0" / layout.RUN, facts)
        seal(ours / "global_step0")
        (tmp_path / "files" / "vocab.json").rename(tmp_path / "files" / "moved.json")
    back = tmp_path / "back"
    assert convert_to_hf.main(["--input-dir", str(ours), "--output-dir", str(back), *arguments]) == 0
    model = AutoModelForCausalLM.from_pretrained(back)
    assert model.get_input_embeddings().weight.shape[0] == vocabulary
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 0
    assert (back / "tokenizer.json").is_file() == (not arguments and not reported)


@pytest.mark.parametrize(
    ("given", "reported"),
    [("absent.json", "no such file"), ("empty", "holds no tokenizer"), ("broken.model", "not a sentencepiece model")],
)
def test_a_tokenizer_that_is_none_is_reported_before_anything_is_written(
    given: str, reported: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, _ = taken_over("unnamed end", tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.model").write_text("no model")
    arguments = ["--input-dir", str(ours), "--output-dir", str(tmp_path / "back"), "--tokenizer", str(tmp_path / given)]
    assert convert_to_hf.main(arguments) == 2
    assert reported in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_a_folder_or_a_model_file_is_a_tokenizer_too(tmp_path: Path) -> None:
    ours, _ = taken_over("unnamed end", tmp_path)
    gpt2_files(tmp_path / "two")
    sentence_piece(tmp_path / "piece")
    (tmp_path / "piece" / "tokenizer_config.json").unlink()
    for number, given in enumerate(("two", "two/vocab.json", "piece", "piece/tokenizer.model")):
        back = tmp_path / f"back{number}"
        arguments = ["--input-dir", str(ours), "--output-dir", str(back), "--tokenizer", str(tmp_path / given)]
        assert convert_to_hf.main(arguments) == 0
        assert len(AutoTokenizer.from_pretrained(back).encode(SAMPLES[0])) > 3


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers would end with an IndexError where a text has such a token."""
    ours, _ = taken_over("llama 3", tmp_path)
    larger = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    larger.add_tokens([f"<new {number}>" for number in range(2000)])
    larger.save_pretrained(tmp_path / "larger")
    arguments = ["--input-dir", str(ours), "--output-dir", str(tmp_path / "back")]
    assert convert_to_hf.main([*arguments, "--tokenizer", str(tmp_path / "larger")]) == 2
    error = capsys.readouterr().err
    assert f"{len(larger):,} tokens" in error and "rows that do not exist" in error and "tokenizer = " in error
    assert not (tmp_path / "back").exists()


def test_another_tokenizer_than_that_of_the_run_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2_files(tmp_path / "files")
    ours = trained(tmp_path, 2000, tokenizer_type="GPT2BPETokenizer", vocab_file=str(tmp_path / "gone.json"))
    facts = {"tokenizer_type": "GPT2BPETokenizer", "vocab_size": 777, "eod": 0}
    files.write_json(ours / "global_step0" / layout.RUN, {"tokenizer": facts})
    seal(ours / "global_step0")
    arguments = [
        "--input-dir",
        str(ours),
        "--output-dir",
        str(tmp_path / "back"),
        "--tokenizer",
        str(tmp_path / "files"),
    ]
    assert convert_to_hf.main(arguments) == 0
    assert "trained with GPT2BPETokenizer of 777 tokens, end of document 0; the" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama 3", "gpt2 files", "sentencepiece"])
def test_a_folder_that_was_moved_says_where_its_tokenizer_is(name: str, tmp_path: Path) -> None:
    ours, keys = taken_over(name, tmp_path)
    moved = ours.rename(tmp_path / "moved")
    (tmp_path / "theirs").rename(tmp_path / "gone")
    settings = {**keys, "load": str(moved), "user_script": "generate.py"}
    with pytest.raises(ConfigError) as error:
        resolve([], settings, Resources(1))
    hints = {issue.key: (issue.hint or "").removeprefix(f"set {issue.key}: ") for issue in error.value.issues}
    assert set(hints) == {key for key in ("vocab_file", "merge_file") if key in keys}
    resolve([], {**settings, **hints}, Resources(1))
    assert tokenizer_of({**keys, **hints}).vocab_size == keys["vocab_size"]


def test_unknown_ends_are_null_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The end of the class, 2, would be another token."""
    ours = trained(tmp_path, 512, tokenizer_type="HFTokenizer", vocab_file=str(tmp_path / "gone.json"))
    assert convert_to_hf.main(["--input-dir", str(ours), "--output-dir", str(tmp_path / "back")]) == 0
    assert "the end-of-text token is not known" in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.config.eos_token_id is None
    assert model.generation_config.eos_token_id is None


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "theirs", 96)
    _, keys = take_over(tmp_path)
    assert "holds no tokenizer that is understood" in capsys.readouterr().err
    assert "tokenizer_type" not in keys


@pytest.mark.parametrize(("rows", "tokens"), [(2000, 380), (382, 383), (102400, 100015), (128, 100)])
def test_a_model_that_was_taken_over_keeps_its_rows(rows: int, tokens: int, tmp_path: Path) -> None:
    write_model(tmp_path / "theirs", rows)
    ours, keys = take_over(tmp_path)
    for load in (ours, tmp_path / "theirs"):
        config = resolve([], {**keys, "load": str(load), "user_script": "generate.py"}, Resources(1)).config
        padded = -(-tokens // 128) * 128
        found = vocabulary_rows(config, padded, tokens=tokens, model_size=1)
        assert (found.rows, found.known) == (rows, min(rows, tokens))


def test_issues_outside_are_reported_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that cannot be written, and a config.json that is none."""
    FOLDERS["unnamed end"](tmp_path / "theirs")
    (tmp_path / "file").write_text("")
    inside = str(tmp_path / "file" / "ours")
    assert convert_from_hf.main(["--input-dir", str(tmp_path / "theirs"), "--output-dir", inside]) == 1
    assert "cannot be read or written: Not a directory" in capsys.readouterr().err
    ours, _ = take_over(tmp_path)
    assert convert_to_hf.main(["--input-dir", str(ours), "--output-dir", inside]) == 1
    assert "cannot be read or written: Not a directory" in capsys.readouterr().err
    for content, reported in (
        ("[]", "this is no object"),
        ("{", "cannot be read"),
        ('{"model_type": 3}', "model_type = 3"),
    ):
        (tmp_path / "theirs" / "config.json").write_text(content)
        arguments = ["--input-dir", str(tmp_path / "theirs"), "--output-dir", str(tmp_path / "other")]
        assert convert_from_hf.main(arguments) in (1, 2)
        said = capsys.readouterr().err
        assert reported in said
        assert "Traceback" not in said
