"""What a model reads: the ids that `transformers` gives, for every kind of tokenizer folder."""

import base64
import json

import pytest
from tokenizers import AddedToken, Tokenizer, processors
from transformers.models.auto import tokenization_auto

from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.tokenizer_config import class_is_wrong
from tests.tokenizers import made

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two blanks,  two more  ",
    " é 東京 \U0001f642\n\n\tx",
    "a\nb</s><s> world",
    "</s>world",
    "<s>[INST] Hello world [/INST] yes</s><s>[INST] no [/INST]",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "one<|endoftext|> two <unk> <pad>",
]
KINDS = {
    "llama2": ("PretrainedFromHF", made.llama2, ""),
    "llama3": ("PretrainedFromHF", made.llama3, ""),
    "no begin": ("PretrainedFromHF", lambda folder: made.llama3(folder, begins=False), "tokenizer.json"),
    "begin token is null": ("PretrainedFromHF", lambda folder: made.chatml(folder, bos_token=None), ""),
    "chatml": ("HFTokenizer", made.chatml, "tokenizer.json"),
    "gpt2": ("PretrainedFromHF", made.gpt2, ""),
    "gpt2 that begins": ("HFGPT2Tokenizer", lambda folder: made.gpt2(folder, add_bos_token=True), ""),
    "sentencepiece": ("SPMTokenizer", made.sentence_piece, "tokenizer.model"),
    "sentencepiece that begins": (
        "SPMTokenizer",
        lambda folder: made.sentence_piece(folder, add_bos_token=True),
        "tokenizer.model",
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    from transformers import AutoTokenizer

    kind, build, file = KINDS[request.param]
    folder = build(tmp_path_factory.mktemp("kind"))
    return make_tokenizer(kind, vocab_file=str(folder / file)), AutoTokenizer.from_pretrained(folder)


def test_text_is_read_as_transformers_reads_it(both):
    ours, theirs = both
    for text in TEXTS:
        assert ours.encode_with_special_tokens(text) == theirs.encode(text, add_special_tokens=False), text


def test_the_same_ids_stand_before_a_text(both):
    ours, theirs = both
    plain, full = (theirs.encode("world", add_special_tokens=add) for add in (False, True))
    assert [*ours.prefix_ids, *plain] == full


def test_the_same_token_is_before_a_text_without_context(both):
    ours, theirs = both
    assert ours.begin == (theirs.eos_token_id if theirs.bos_token_id is None else theirs.bos_token_id)


def test_the_same_tokens_are_special(both):
    ours, theirs = both
    named = {token: theirs.convert_tokens_to_ids(token) for token in theirs.all_special_tokens}
    assert named.items() <= ours.special_tokens.items()


def with_processor(folder, processor, special=("<|endoftext|>", "<s>", "</s>")):
    tokenizer = made.byte_level(list(special))
    tokenizer.post_processor = processor({token: tokenizer.token_to_id(token) for token in special})
    tokenizer.save(str(folder / "tokenizer.json"))
    return make_tokenizer("HFTokenizer", vocab_file=str(folder / "tokenizer.json"))


def template(single):
    return lambda ids: processors.TemplateProcessing(single=single, special_tokens=list(ids.items()))


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (template("$A"), []),
        (template("<s> $A"), ["<s>"]),
        (template("<s> $A </s>"), ["<s>"]),  # what it puts behind a text has no place where a model goes on
        (template("$A </s>"), []),
        (template("</s> <s> $A"), ["</s>", "<s>"]),
        (lambda ids: processors.BertProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"])), ["<s>"]),
        (lambda ids: processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"])), ["<s>"]),
        (lambda ids: processors.ByteLevel(trim_offsets=False), []),
        (lambda ids: processors.Sequence([processors.ByteLevel(), template("<s> $A </s>")(ids)]), ["<s>"]),
    ],
    ids=["plain", "begin", "both", "end", "two", "bert", "roberta", "byte level", "sequence"],
)
def test_only_what_a_post_processor_puts_before_a_text_is_read(tmp_path, processor, expected):
    tokenizer = with_processor(tmp_path, processor)
    assert tokenizer.prefix_ids == tuple(tokenizer.special_tokens[token] for token in expected)


def test_a_vocabulary_of_llama_3_begins_texts_and_knows_the_marks_of_turns(tmp_path):
    """By the public ids of its model card; the ranks are made up."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [number.to_bytes(3, "big") for number in range(128_000 - len(tokens))]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    tokenizer = make_tokenizer("TiktokenTokenizer", vocab_file=str(tmp_path / "tokenizer.model"))
    assert (tokenizer.prefix_ids, tokenizer.begin, tokenizer.eod) == ((128000,), 128000, 128001)
    text = "<|start_header_id|>user<|end_header_id|>hi<|eot_id|>"
    assert tokenizer.encode_with_special_tokens(text) == [128006, *b"user", 128007, *b"hi", 128009]
    assert max(tokenizer.encode(text)) < 128000


def test_add_bos_token_does_not_overrule_a_tokenizer_file(tmp_path):
    from transformers import AutoTokenizer

    folder = made.llama3(tmp_path, begins=False)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    ours = make_tokenizer("PretrainedFromHF", vocab_file=str(folder))
    assert AutoTokenizer.from_pretrained(folder).encode("world") == ours.encode("world")
    assert ours.prefix_ids == ()


def test_the_end_token_is_read_as_the_file_describes_it(tmp_path):
    from transformers import PreTrainedTokenizerFast

    source = made.byte_level([])
    source.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False, rstrip=True)])
    source.save(str(tmp_path / "tokenizer.json"))
    ours = make_tokenizer("HFTokenizer", vocab_file=str(tmp_path / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = "one<|endoftext|>  two"
    assert ours.encode_with_special_tokens(text) == theirs.encode(text, add_special_tokens=False)
    assert "  " not in ours.decode(ours.encode_with_special_tokens(text))


def test_a_token_that_only_tokenizer_config_calls_special_is_read_as_one(tmp_path):
    source = made.byte_level(["<|endoftext|>"])
    content = json.loads(source.to_str())
    content["model"]["vocab"]["<turn>"] = 400  # in the vocabulary, without an entry among the added tokens
    (tmp_path / "tokenizer.json").write_text(Tokenizer.from_str(json.dumps(content)).to_str())
    path = str(tmp_path / "tokenizer.json")
    assert len(make_tokenizer("HFTokenizer", vocab_file=path).encode_with_special_tokens("<turn>")) > 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_special_tokens": {"turn": "<turn>"}}))
    tokenizer = make_tokenizer("HFTokenizer", vocab_file=path)
    assert tokenizer.special_tokens["<turn>"] == 400
    assert tokenizer.encode_with_special_tokens("<turn>") == [400]
    assert 400 not in tokenizer.encode("<turn>")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"bos_token": 3, "added_tokens_decoder": [], "extra_special_tokens": 1}']
)
def test_an_unusable_tokenizer_config_says_nothing(tmp_path, content):
    folder = made.gpt2(tmp_path)
    (folder / "tokenizer_config.json").write_text(content)
    tokenizer = make_tokenizer("PretrainedFromHF", vocab_file=str(folder))
    assert tokenizer.prefix_ids == ()
    assert set(tokenizer.special_tokens) == {"<|endoftext|>"}


def test_model_types_whose_class_is_wrong_are_those_of_transformers(tmp_path):
    as_written = {"TokenizersBackend", "PythonBackend", "PreTrainedTokenizer", "MistralCommonBackend"}
    (tmp_path / "tokenizer.json").write_text("{}")
    for model_type, name in tokenization_auto.TOKENIZER_MAPPING_NAMES.items():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        expected = name is not None and name.removesuffix("Fast") in as_written
        assert class_is_wrong(tmp_path) == expected, model_type
