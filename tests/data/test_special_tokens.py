"""Special tokens that texts spell, patterns that texts lack, what a tokenizer loses: the tokens and the reports."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed.reader import IndexedDataset
from megatron.data.preprocess.special_token_search import spells_one
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.round_trip import losses
from tests.tokenizers import made
from tests.tokenizers.test_chat_template import PLAIN, folder_with
from tools.preprocess_data import main
from tools.preprocess_data_with_chat_template import main as main_of_chats

TEXTS = [
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
    "no token is spelt < here |> and im_end",
    "def f():<|endoftext|>\n    return 1",
    "plain words",
]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tokenized(tmp_path, texts, kind, vocab_file, *more):
    """The documents that the tool writes of the texts."""
    source = lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    reported = ["--input", source, "--output-prefix", str(tmp_path / "out"), "--tokenizer-type", kind, *more]
    assert main([*reported, *(["--vocab-file", str(vocab_file)] if vocab_file else [])]) == 0
    data = IndexedDataset(tmp_path / "out_text_document")
    return [data[number].tolist() for number in range(len(data))]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_special_tokens_are_plain_text_and_counted(tmp_path, capsys, workers):
    folder = made.chatml(tmp_path / "t")
    ids = tokenized(tmp_path, TEXTS, "PretrainedFromHF", folder, "--workers", workers)
    tokenizer = make_tokenizer("PretrainedFromHF", vocab_file=str(folder))
    assert ids == [tokenizer.encode(text) for text in TEXTS]
    assert not {*tokenizer.special_tokens.values()} & {token for row in ids for token in row}
    reported = capsys.readouterr().out
    assert "2 documents spell special tokens as plain text; --parse-special-tokens makes ids of them" in reported


@pytest.mark.parametrize("build", [made.chatml, made.llama3, made.llama2])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_parsed_special_tokens_have_the_ids_of_transformers(tmp_path, capsys, build, workers):
    from transformers import AutoTokenizer

    folder = build(tmp_path / "t")
    texts = [*TEXTS, "<s> a </s><|begin_of_text|>b<|eot_id|>"]
    ids = tokenized(tmp_path, texts, "PretrainedFromHF", folder, "--parse-special-tokens", "--workers", workers)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ids == [theirs.encode(text, add_special_tokens=False) for text in texts]
    assert "documents spell special tokens, which are their ids" in capsys.readouterr().out


def test_nothing_is_reported_where_no_token_is_spelt(tmp_path, capsys):
    tokenized(tmp_path, TEXTS[1::2], "PretrainedFromHF", made.chatml(tmp_path / "t"))
    reported = capsys.readouterr().out
    assert "special tokens" not in reported
    assert "does not keep" not in reported


def test_labels_with_parsed_special_tokens(tmp_path, capsys):
    """No loss up to the assistant's header, whose ids the flag names."""
    folder = made.chatml(tmp_path / "t")
    tokenizer = make_tokenizer("PretrainedFromHF", vocab_file=str(folder))
    pattern = tokenizer.encode_with_special_tokens("<|im_start|>assistant\n")
    reported = ["--parse-special-tokens", "--mask-before-token", ",".join(map(str, pattern))]
    ids = tokenized(tmp_path, TEXTS, "PretrainedFromHF", folder, *reported)
    labels = IndexedDataset(tmp_path / "out_label_document")
    answer = tokenizer.encode_with_special_tokens("Hello<|im_end|>\n")
    assert [token for token in labels[0].tolist() if token >= 0] == answer
    assert labels[1].tolist() == ids[1]
    out = capsys.readouterr().out
    assert "1 of the 4 documents hold the tokens of --mask-before-token; of the 3 others every token" in out


def test_a_pattern_that_no_document_holds(tmp_path, capsys):
    tokenized(tmp_path, TEXTS, "CharLevelTokenizer", None, "--mask-before-token", "1,2,3")
    assert "none of the 4 documents hold the tokens of --mask-before-token; of the 4 others" in capsys.readouterr().out
    tokenized(tmp_path, TEXTS, "CharLevelTokenizer", None, "--mask-before-token", str(ord("n")), "--workers", "2")
    assert "--mask-before-token" not in capsys.readouterr().out


@pytest.mark.parametrize("pattern", ["512", "-1", "1,600"])
def test_a_pattern_of_another_vocabulary_is_refused(tmp_path, capsys, pattern):
    source = lines(tmp_path / "in.jsonl", [{"text": "a"}])
    reported = ["--input", source, "--output-prefix", str(tmp_path / "out"), "--tokenizer-type", "CharLevelTokenizer"]
    assert main([*reported, f"--mask-before-token={pattern}"]) == 2
    assert "the ids of this tokenizer are 0 to 511" in capsys.readouterr().err


def test_counts_survive_a_resume(tmp_path):
    """They are part of what an interrupted work keeps."""
    from megatron.data.preprocess.resume_state import Journal, PreprocessCounts

    journal = Journal(str(tmp_path / "out"), "task")
    journal.write(PreprocessCounts(1, notes={"what": 3}), [])
    retained = journal.read()
    assert retained is not None
    assert retained[0].notes == {"what": 3}


def test_a_turn_may_spell_special_tokens_by_request(tmp_path, capsys):
    from transformers import AutoTokenizer

    folder = made.chatml(tmp_path / "t")
    turns = [{"role": "user", "content": "see <|im_end|> here"}, {"role": "assistant", "content": "ok"}]
    source = lines(tmp_path / "chats.jsonl", [{"conversation": turns}, {"conversation": turns[1:]}])
    reported = ["--input", source, "--output-prefix", str(tmp_path / "out"), "--tokenizer-path", str(folder)]
    assert main_of_chats(reported) == 0
    assert len(IndexedDataset(tmp_path / "out_conversation_document")) == 1
    assert "1 that the chat template cannot take" in capsys.readouterr().out
    assert main_of_chats([*reported, "--parse-special-tokens"]) == 0
    data = IndexedDataset(tmp_path / "out_conversation_document")
    theirs = AutoTokenizer.from_pretrained(folder)
    assert data[0].tolist() == [*theirs.apply_chat_template(turns, return_dict=False), theirs.eos_token_id]


@pytest.mark.parametrize("text", ["a<s>", "<|xy|>b"])
@pytest.mark.parametrize("other", ["", "<|x|", "<", "<|", "<|x|>", "[P]", "]P["])
def test_spelt_tokens_are_found(text, other):
    tokens = ("<s>", "<|x|>", "<|xy|>", "[P]", "")
    assert spells_one(text, tokens)
    assert spells_one(other, tokens) == (other in tokens and other != "")


def wordpiece(tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    return make_tokenizer("BertWordPieceLowerCase", vocab_file=str(tmp_path / "vocab.txt"))


def test_what_a_tokenizer_loses(tmp_path, capsys):
    assert losses(make_tokenizer("CharLevelTokenizer")) == []
    assert losses(make_tokenizer("PretrainedFromHF", vocab_file=str(made.chatml(tmp_path / "t")))) == []
    lost = losses(wordpiece(tmp_path))
    assert {"line ends", "repeated blanks", "capitals", "emoji"} <= set(lost)
    tokenized(tmp_path, ["ab c"], "BertWordPieceLowerCase", tmp_path / "vocab.txt")
    assert "this tokenizer does not keep every text: line ends" in capsys.readouterr().out


def test_notes_do_not_change_what_is_written(tmp_path):
    """The same bytes, with the tokens of the tokenizer known or not."""
    assert tokenized(tmp_path, TEXTS, "CharLevelTokenizer", None) == [list(text.encode()) for text in TEXTS]
    assert np.dtype("<u2") == IndexedDataset(Path(tmp_path) / "out_text_document").dtype


@pytest.mark.parametrize("flag", ["--no-mask", "--for-rm"])
def test_no_conversation_is_left_out_for_marks_that_nobody_asks_for(tmp_path, capsys, flag):
    """The template renders earlier answers otherwise once later ones are there; that matters to a mask alone."""
    folder = folder_with(tmp_path / "t", PLAIN.replace("{{ m['content'] }}", "{{ m.content if loop.last else '' }}"))
    turns = [{"role": role, "content": "words"} for role in ("user", "assistant") * 2]
    source = lines(tmp_path / "chats.jsonl", [{"conversation": turns}])
    reported = ["--input", source, "--output-prefix", str(tmp_path / "out"), "--tokenizer-path", str(folder)]
    assert main_of_chats(reported) == 1
    assert "renders earlier turns differently" in capsys.readouterr().err
    assert main_of_chats([*reported, flag]) == 0
    tokens = IndexedDataset(tmp_path / "out_conversation_document")[0].tolist()
    labels = IndexedDataset(tmp_path / "out_conversation_label_document")[0].tolist()
    assert labels == (tokens if flag == "--no-mask" else [-100] * (len(tokens) - 1) + tokens[-1:])


@pytest.mark.parametrize(
    ("turn", "reported"),
    [
        ({"from": "human", "value": "a"}, "each turn of a conversation has a 'role' and a 'content'"),
        ({"role": "user", "content": {"text": "a"}}, "a list of parts that are texts"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "null beside 'tool_calls' alone"),
    ],
)
def test_a_conversation_that_cannot_be_read_is_reported_what_it_lacks(tmp_path, capsys, turn, reported):
    """No other key would help."""
    folder, source = folder_with(tmp_path / "t", PLAIN), lines(tmp_path / "chats.jsonl", [{"conversation": [turn]}])
    words = ["--input", source, "--output-prefix", str(tmp_path / "out"), "--tokenizer-path", str(folder)]
    assert main_of_chats(words) == 1
    error = capsys.readouterr().err
    assert reported in error
    assert "--jsonl-keys" not in error
