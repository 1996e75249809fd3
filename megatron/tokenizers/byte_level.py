"""The fast path: byte-level BPE run by tiktoken's engine, where it gives the ids that `tokenizers` gives.

Both engines part a text into words by a pattern and then join the bytes of each word, rank by rank. They differ in
what they look up. `tokenizers` joins two neighbours when the *pair* is in the list of merges; tiktoken joins them when
the *bytes* of both together are a token. Let t = (a, b) be a merge. If joining the bytes of t by all merges before it
always leaves exactly a and b, the two rules never differ: as long as the ends of t are ends of tokens, what happens
inside does not depend on what is around, so whichever two neighbours spell t, they are a and b. `unequal_merge` checks
that for every merge; a vocabulary that a BPE trainer made passes, one that was put together by hand may not. Some files
(those of Llama 3, and what was converted from tiktoken) list every pair that spells a token, one after another: one of
them must be the pair that is left; the others never are beside one another when their turn comes, nor later.

The patterns are a known few. What they mean is checked on a probe text, which holds every 61st character of Unicode;
the tests compare every character. Where anything is unknown the fast path is not taken, and `engine` says why.

Sources: arXiv:2306.16842 (proper vocabularies), https://github.com/github/rust-gems (pairs across a border).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

# GPT-2's pattern as the engine runs it fastest: possessive, which takes the same words.
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS_AND_PUNCTUATION = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K_WORDS = _CONTRACTIONS + _LETTERS_AND_PUNCTUATION % r"\p{N}{1,3}" + _SPACES
QWEN2_WORDS = _CONTRACTIONS + _LETTERS_AND_PUNCTUATION % r"\p{N}" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN_WORDS = frozenset({CL100K_WORDS, QWEN2_WORDS, O200K_WORDS})

_NEVER_IN_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))  # bytes that no text has, so a vocabulary may lack them
_UNUSED = "<|endoftext|>"  # the engine searches faster for one special token, which is never allowed, than for none
LONG_TEXT = 1 << 20  # longer texts are cut where a word begins [characters]
_WORD_BEGINS = re.compile(r"(?<=\S) ")  # in every known pattern a space after something else begins a word


class CannotEncodeAlike(Exception):
    """Why the engine does not take a vocabulary."""


@dataclass(frozen=True)
class _Parts:
    """Text that becomes tokens before words are parted: added tokens, longest first, and their ids."""

    pattern: re.Pattern[str]
    ids: dict[str, int]

    def split(self, text: str) -> list[tuple[str, int | None]]:
        """(ordinary text, None) and (added token, its id), in order."""
        found: list[tuple[str, int | None]] = []
        end = 0
        for match in self.pattern.finditer(text):
            if match.start() > end:
                found.append((text[end : match.start()], None))
            found.append((match.group(), self.ids[match.group()]))
            end = match.end()
        if end < len(text):
            found.append((text[end:], None))
        return found


class ByteLevelEngine:
    """Encodes as a `tokenizers.Tokenizer` does. Raises CannotEncodeAlike, with the reason, where that is not sure."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        description = json.loads(tokenizer.to_str())
        words = _words_of(description)
        ranks, ids = _ranks_of(description)
        self._table = None if np.array_equal(ids, np.arange(len(ids))) else ids
        self._normalise = _normaliser_of(tokenizer, description)
        self._raw, self._normal = _added_of(description, self._normalise)
        self._core = _core(words, ranks)
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
        self._dtype = np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32
        self._tokenizer = tokenizer
        for text in _probe():
            if self.encode(text).tolist() != tokenizer.encode(text, add_special_tokens=False).ids:
                raise CannotEncodeAlike(f"the engines differ on {text[:20]!r}")

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text [tokens]."""
        pieces: Iterable[str] = cut(text) if len(text) > LONG_TEXT else [text]
        found = [ids.astype(self._dtype, copy=False) for piece in pieces for ids in self._parts(piece)]
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.empty(0, self._dtype)

    def _parts(self, text: str) -> list[np.ndarray]:
        if self._raw is None and self._normal is None and self._normalise is None:
            return [self._words(text)] if text else []
        found = []
        for raw, raw_id in _split(self._raw, text):
            if raw_id is not None:
                found.append(np.array([raw_id], np.uint32))
                continue
            # The normal forms keep ASCII as it is.
            normal = raw if self._normalise is None or raw.isascii() else self._normalise(raw)
            for piece, piece_id in _split(self._normal, normal):
                if piece_id is None:
                    found.append(self._words(piece))
                else:
                    found.append(np.array([piece_id], np.uint32))
        return found

    def _words(self, text: str) -> np.ndarray:
        try:
            ids = np.frombuffer(self._core.encode_to_tiktoken_buffer(text, frozenset()), np.uint32)
        except ValueError:  # its pattern gives up on very long runs of white space
            return np.array(self._words_slowly(text), np.uint32)
        return ids if self._table is None else self._table[ids]

    def _words_slowly(self, text: str) -> list[int]:
        tokenizer = self._tokenizer
        words = tokenizer.pre_tokenizer.pre_tokenize_str(text)
        return [token.id for word, _ in words for token in tokenizer.model.tokenize(word)]


def cut(text: str) -> Iterator[str]:
    """A long text in pieces that begin with the space before a word; joined, they are the text again."""
    start = 0
    while len(text) - start > LONG_TEXT:
        match = _WORD_BEGINS.search(text, start + LONG_TEXT - 1)
        if match is None:
            break
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def make_engine(tokenizer: FastTokenizer) -> tuple[ByteLevelEngine | None, str]:
    """The engine, or None, and in words what encodes whole corpora."""
    try:
        return ByteLevelEngine(tokenizer), "tiktoken's engine (ids compared with tokenizers)"
    except CannotEncodeAlike as error:
        return None, f"tokenizers ({error})"


def _split(parts: _Parts | None, text: str) -> list[tuple[str, int | None]]:
    if not text:
        return []
    return [(text, None)] if parts is None else parts.split(text)


def _core(words: str, ranks: dict[bytes, int]) -> Any:
    try:
        import tiktoken
    except ModuleNotFoundError as error:
        raise CannotEncodeAlike("tiktoken is not installed; pip install 'neox[data]' makes this faster") from error
    encoding = tiktoken.Encoding("", pat_str=words, mergeable_ranks=ranks, special_tokens={_UNUSED: len(ranks)})
    return encoding._core_bpe


def _words_of(description: dict[str, Any]) -> str:
    """The pattern that parts words."""
    stages = description["pre_tokenizer"] or {"type": "none"}
    stages = stages["pretokenizers"] if stages["type"] == "Sequence" else [stages]
    if stages[-1]["type"] != "ByteLevel":
        raise CannotEncodeAlike("not a byte-level vocabulary")
    if any(stage.get("add_prefix_space") for stage in stages):
        raise CannotEncodeAlike("a space is put before each text")
    if len(stages) == 1 and stages[0].get("use_regex", True):
        return GPT2_WORDS
    if len(stages) == 2 and stages[0]["type"] == "Split" and not stages[1].get("use_regex", True):
        pattern = stages[0]["pattern"].get("Regex")
        if pattern in _KNOWN_WORDS and stages[0]["behavior"] == "Isolated" and not stages[0]["invert"]:
            return str(pattern)
    raise CannotEncodeAlike("words are parted in a way that is not known here")


def _normaliser_of(tokenizer: FastTokenizer, description: dict[str, Any]) -> Callable[[str], str] | None:
    kind = (description["normalizer"] or {"type": None})["type"]
    if kind is None:
        return None
    if kind not in {"NFC", "NFD", "NFKC", "NFKD"}:
        raise CannotEncodeAlike(f"the normaliser {kind} is not known here")
    normalise: Callable[[str], str] = tokenizer.normalizer.normalize_str
    return normalise


def _added_of(
    description: dict[str, Any], normalise: Callable[[str], str] | None
) -> tuple[_Parts | None, _Parts | None]:
    """Added tokens that are found in the text as it stands, and those that are found in the normalised text."""
    groups: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for token in description["added_tokens"]:
        if token["special"]:
            continue  # a text cannot spell it
        content = token["content"]
        if any(token[flag] for flag in ("single_word", "lstrip", "rstrip")) or re.search(r"\S ", content):
            raise CannotEncodeAlike(f"the added token {content!r} takes more than its own text")
        if normalise is not None and normalise(content) != content:
            raise CannotEncodeAlike(f"the added token {content!r} is not in its normal form")
        groups[bool(token["normalized"])][content] = token["id"]
    raw, normal = (_parts_of(group) for group in groups)
    return raw, normal


def _parts_of(ids: dict[str, int]) -> _Parts | None:
    if not ids:
        return None
    longest_first = sorted(ids, key=len, reverse=True)
    return _Parts(re.compile("|".join(map(re.escape, longest_first))), ids)


def _ranks_of(description: dict[str, Any]) -> tuple[dict[bytes, int], np.ndarray]:
    """Bytes of every token -> rank, the single bytes first and then the merges in order; and the id of each rank."""
    model = description["model"]
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if model["type"] != "BPE" or odd or model.get("byte_fallback"):
        raise CannotEncodeAlike(f"the model is not plain BPE ({', '.join(odd) or model['type']})")
    vocabulary = model["vocab"]
    alphabet = byte_alphabet()
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    groups: dict[str, list[tuple[str, str]]] = {}
    last = None
    for first, second in merges:
        made = first + second
        if made not in groups or made == last:  # a later pair finds its token made already
            groups.setdefault(made, []).append((first, second))
        last = made
    tokens = [*alphabet, *groups]
    never = {alphabet[byte] for byte in _NEVER_IN_UTF8}
    if any(token not in vocabulary and token not in never for token in tokens):
        raise CannotEncodeAlike("its vocabulary lacks a byte or a merged token")
    number = {token: rank for rank, token in enumerate(tokens)}
    pairs = [[(number.get(first, -1), number.get(second, -1)) for first, second in group] for group in groups.values()]
    wrong = unequal_merge(pairs, len(alphabet))
    if wrong is not None:
        first, second = list(groups.values())[wrong][0]
        raise CannotEncodeAlike(f"its merge {first} + {second} may also come about in another way")
    if model.get("ignore_merges"):
        unreached = set(vocabulary) - set(tokens) - {token["content"] for token in description["added_tokens"]}
        if unreached:
            raise CannotEncodeAlike("whole words are looked up before merging, and some have no merge")
    bytes_of = {character: byte for byte, character in enumerate(alphabet)}
    ranks = {bytes(map(bytes_of.__getitem__, token)): rank for token, rank in number.items()}
    return ranks, np.array([vocabulary.get(token, 0) for token in tokens], np.uint32)


def unequal_merge(merges: Sequence[Sequence[tuple[int, int]]], singles: int) -> int | None:
    """The first token whose bytes, joined by the merges before it alone, are not two parts that it lists; None when
    there is none.

    merges: for rank `singles + i` the pairs that make it, each as the ranks of its two parts. Whether a border between
    two tokens stays while their bytes are joined is found by taking both apart along the border, latest merge first.
    """
    made: dict[tuple[int, int], int] = {}
    parts: list[tuple[int, int]] = []
    for index, pairs in enumerate(merges):
        rank = singles + index
        left = (
            (first, second)
            for first, second in pairs
            if 0 <= first < rank and 0 <= second < rank and _border_stays(first, second, made, parts, singles)
        )
        pair = next(left, None)
        if pair is None:
            return index
        made[pair] = rank
        parts.append(pair)
    return None


def _border_stays(
    left: int, right: int, made: dict[tuple[int, int], int], parts: Sequence[tuple[int, int]], singles: int
) -> bool:
    """Whether two tokens stay apart while the bytes of both are joined by the merges in `made`."""
    limit = singles + len(parts)
    while True:
        across = made.get((left, right))
        if across is not None and across < limit:
            return False
        # Undo the later of both merges; on equal ranks the left one was joined first.
        if left > right:
            if left < singles:
                return True
            limit, left = left, parts[left - singles][1]
        else:
            if right < singles:
                return True
            limit, right = right + 1, parts[right - singles][0]


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (Radford et al. 2019, encoder.py)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(0x100)]


def _probe() -> list[str]:
    """Texts on which both engines are compared whenever one is built; the tests compare far more."""
    characters = [chr(code) for code in range(0, 0x110000, 61) if not 0xD800 <= code < 0xE000]
    code = "def f(x):\n\treturn  x  # it's 12345 IT'S\r\n\r\n    if (a!=b){;}\n\n\n   \n"
    return [
        "",
        "Hello world, it's a test; they'll've said 'd 'S  two  spaces\u00a0here.\n",
        code,
        " " * 40 + "x" + "\n" * 7 + "\t\t y \u3000\u2028z",
        "naïve café e\u0301 \ufb01 \uff21 東京タワー 🙂👩\u200d💻 हिन्दी العربية Ünïcödé\u0345 ſ K ß İ",
        "<|endoftext|> <|padding|> </s> <pad>",
        "'ſ it'ſ 'ſx 'K a'k DON'T I'LL 'Tſ",
        "".join(characters),
        " a".join(characters[::7]),
        "1".join(characters[::11]),
        "'".join(characters[::13]),
    ]
