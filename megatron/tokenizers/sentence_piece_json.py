"""A sentencepiece model as a tokenizer.json, for programs that read no .model.

The .model is a protocol buffer; its few fields that matter are read here: pieces with scores and kinds, the algorithm
and the normalisation. A BPE model merges by the score of what a merge makes, so its merges are its pieces, best first.
Where LLaMA's class is beside the .model, the file says what that class reads. Whether the two give the same ids, in
training as in prompts, is tried on texts, not assumed.

Source: sentencepiece_model.proto of https://github.com/google/sentencepiece (fields by number).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as FastTokenizer

from megatron.tokenizers.llama_class import as_read
from megatron.tokenizers.sentence_piece import SPMTokenizer

BLANK = "\u2581"
_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6
_UNIGRAM, _BPE = 1, 2
_TRIED = (
    "The quick brown fox jumps over the lazy dog.",
    "  two  blanks   and three, and one at the end ",
    "tabs\tand\nlines\r\n\n  def f(x):\n    return x[:3]",
    "Na\u00efve caf\u00e9 \u2014 \u00fcber stra\u00dfe, 42 \u20ac 3.14159",
    "\u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \u041f\u0440\u0438\u0432\u0435\u0442 \U0001f642\U0001f469",
    "e\u0301 \ufb01 \uff21\u00a0x",
    "\n\tlines outside \n",
    "a",
    " ",
)


@dataclass(frozen=True)
class _Model:
    """pieces: (text, score, kind). charsmap: of the normalisation, compiled. The rest: settings of the file."""

    pieces: list[tuple[str, float, int]]
    algorithm: int
    byte_fallback: bool
    charsmap: bytes
    dummy_prefix: bool
    single_blanks: bool


def as_tokenizer_json(tokenizer: SPMTokenizer, path: Path) -> str | None:
    """The text of a tokenizer.json that gives the same ids, or None where none was found. path: of the .model."""
    model = _read(path.read_bytes())
    unknown = next((number for number, (_, _, kind) in enumerate(model.pieces) if kind == _UNKNOWN), None)
    if model.algorithm not in (_UNIGRAM, _BPE) or unknown is None:
        return None
    try:
        made = FastTokenizer(_algorithm(model, unknown))
        steps = _normalizers(model)
        if steps:
            made.normalizer = normalizers.Sequence(steps)
        _decode_and_mark(made, model)
    except Exception:  # noqa: BLE001  the library raises nothing narrower; such a model stays a .model
        return None
    content = as_read(made.to_str(pretty=False), tokenizer.blank)
    return content if _reads_alike(FastTokenizer.from_str(content), tokenizer) else None


def is_unigram(path: Path) -> bool:
    """Whether a .model chooses pieces by their scores, and not by merges."""
    return _read(path.read_bytes()).algorithm == _UNIGRAM


def _reads_alike(made: FastTokenizer, tokenizer: SPMTokenizer) -> bool:
    """Whether both read texts alike, those with special tokens too, which are text in training."""
    for text in (*_TRIED, *_between_special(tokenizer)):
        if made.encode(text, add_special_tokens=False).ids != tokenizer.encode_with_special_tokens(text):
            return False
    made.encode_special_tokens = True
    return all(made.encode(text, add_special_tokens=False).ids == tokenizer.encode(text) for text in _TRIED)


def _between_special(tokenizer: SPMTokenizer) -> list[str]:
    end = tokenizer.piece(tokenizer.eod)
    return [f"{end}The{end} fox {end}  jumps", f" {end}\n{end}"]


def _algorithm(model: _Model, unknown: int) -> models.BPE | models.Unigram:
    if model.algorithm == _UNIGRAM:
        scored = [(text, score) for text, score, _ in model.pieces]
        return models.Unigram(scored, unk_id=unknown, byte_fallback=model.byte_fallback)
    ids = {text: number for number, (text, _, _) in enumerate(model.pieces)}
    text = model.pieces[unknown][0]
    return models.BPE(ids, _merges(model), unk_token=text, fuse_unk=True, byte_fallback=model.byte_fallback)


def _merges(model: _Model) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best piece first."""
    scores = {text: score for text, score, kind in model.pieces if kind not in (_UNKNOWN, _CONTROL, _BYTE)}
    order = {text: number for number, (text, _, _) in enumerate(model.pieces)}
    found = []
    for text, score in scores.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                found.append((-score, order[left], order[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _normalizers(model: _Model) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.single_blanks:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(BLANK))
    return [*steps, normalizers.Replace(" ", BLANK)]


def _decode_and_mark(made: FastTokenizer, model: _Model) -> None:
    parts: list[decoders.Decoder] = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(parts)
    for text, _, kind in model.pieces:
        if kind in (_CONTROL, _UNKNOWN):
            made.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif kind == _USER:
            made.add_tokens([AddedToken(text, special=False, normalized=False)])


def _read(content: bytes) -> _Model:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    rules: dict[int, int | bytes] = {}
    for field, value in _fields(content):
        if not isinstance(value, bytes):
            continue
        if field == 1:
            inner = dict(_fields(value))
            score = struct.unpack("<f", bytes(inner[2]))[0] if isinstance(inner.get(2), bytes) else 0.0
            kind = inner.get(3, 1)
            pieces.append((bytes(inner[1]).decode("utf-8"), score, int(kind) if isinstance(kind, int) else 1))  # type: ignore[arg-type]
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            rules = dict(_fields(value))
    charsmap = rules.get(2, b"")
    return _Model(
        pieces,
        algorithm=int(trainer.get(3, _UNIGRAM)),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        dummy_prefix=bool(rules.get(3, 1)),
        single_blanks=bool(rules.get(4, 1)),
    )


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: whole numbers as int, everything else as its bytes."""
    offset = 0
    while offset < len(content):
        tag, offset = _number(content, offset)
        kind = tag & 7
        if kind == 0:
            value, offset = _number(content, offset)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, offset = _number(content, offset)
        else:
            size = {1: 8, 5: 4}[kind]
        yield tag >> 3, content[offset : offset + size]
        offset += size


def _number(content: bytes, offset: int) -> tuple[int, int]:
    """A number in base 128, least part first, and where the next field begins."""
    value = shift = 0
    while True:
        byte = content[offset]
        offset += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, offset
