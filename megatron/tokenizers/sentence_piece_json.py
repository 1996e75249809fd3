"""A sentencepiece model as a tokenizer.json, for programs that read no .model.

A BPE model merges by the score of what a merge makes, so its merges are its pieces, best first.
Where LLaMA's class is beside the .model, the file says what that class reads. Whether the two give the same ids, in
training as in prompts, is tried on texts, not assumed.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as FastTokenizer

from megatron.tokenizers.llama_class import as_read
from megatron.tokenizers.sentence_piece import SPMTokenizer
from megatron.tokenizers.sentence_piece_model import BPE, BYTE, CONTROL, UNIGRAM, UNKNOWN, USER, PieceModel, read_model
from megatron.tokenizers.spelt_tokens import without_special_tokens

BLANK = "\u2581"
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


_APART = tuple(
    unicodedata.normalize("NFD", text) for text in ("\uff8a\uff9f\uff7f\uff7a\uff9d", "\ud55c\uad6d\uc5b4", "Vi\u1ec7t")
)
_SYMBOLS = 8  # user-defined ones that are tried


def as_tokenizer_json(tokenizer: SPMTokenizer, path: Path) -> str | None:
    """The text of a tokenizer.json that gives the same ids, or None where none was found. path: of the .model."""
    model = read_model(path.read_bytes())
    unknown = next((number for number, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN), None)
    if model.algorithm not in (UNIGRAM, BPE) or unknown is None:
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


def text_read_otherwise(content: str, tokenizer: SPMTokenizer, path: Path) -> str | None:
    """A text of which the tokenizer.json gives other ids; None where none is found.

    The tokenizers library splits at user-defined symbols before it normalizes, and its normalizer composes no marks
    that lie apart: half-width kana, decomposed Korean and Vietnamese.

    Args:
        content: Of the tokenizer.json.
        tokenizer: The sentencepiece model.
        path: Of the .model.
    """
    made = FastTokenizer.from_str(content)
    made.encode_special_tokens = tokenizer.splits_special
    symbols = [text for text, _, kind in read_model(path.read_bytes()).pieces if kind == USER]
    for text in (*(f"a{symbol}b {symbol} c" for symbol in symbols[:_SYMBOLS]), *_APART):
        if made.encode(text, add_special_tokens=False).ids != tokenizer.encode_with_special_tokens(text):
            return text
    return None


def is_unigram(path: Path) -> bool:
    """Whether a .model chooses pieces by their scores, and not by merges."""
    return read_model(path.read_bytes()).algorithm == UNIGRAM


def _reads_alike(made: FastTokenizer, tokenizer: SPMTokenizer) -> bool:
    """Whether both read texts alike, those with special tokens too, which are text in training."""
    made.encode_special_tokens = tokenizer.splits_special
    for text in (*_TRIED, *_between_special(tokenizer)):
        if made.encode(text, add_special_tokens=False).ids != tokenizer.encode_with_special_tokens(text):
            return False
    made.encode_special_tokens = True
    made = without_special_tokens(made, tokenizer.special_tokens)
    return all(made.encode(text, add_special_tokens=False).ids == tokenizer.encode(text) for text in _TRIED)


def _between_special(tokenizer: SPMTokenizer) -> list[str]:
    end = tokenizer.piece(tokenizer.eod)
    return [f"{end}The{end} fox {end}  jumps", f" {end}\n{end}"]


def _algorithm(model: PieceModel, unknown: int) -> models.BPE | models.Unigram:
    if model.algorithm == UNIGRAM:
        scored = [(text, score) for text, score, _ in model.pieces]
        return models.Unigram(scored, unk_id=unknown, byte_fallback=model.byte_fallback)
    ids = {text: number for number, (text, _, _) in enumerate(model.pieces)}
    text = model.pieces[unknown][0]
    return models.BPE(ids, _merges(model), unk_token=text, fuse_unk=True, byte_fallback=model.byte_fallback)


def _merges(model: PieceModel) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best piece first."""
    scores = {text: score for text, score, kind in model.pieces if kind not in (UNKNOWN, CONTROL, BYTE)}
    order = {text: number for number, (text, _, _) in enumerate(model.pieces)}
    found = []
    for text, score in scores.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                found.append((-score, order[left], order[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _normalizers(model: PieceModel) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.single_blanks:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(BLANK))
    return [*steps, normalizers.Replace(" ", BLANK)]


def _decode_and_mark(made: FastTokenizer, model: PieceModel) -> None:
    parts: list[decoders.Decoder] = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(parts)
    for text, _, kind in model.pieces:
        if kind in (CONTROL, UNKNOWN):
            made.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif kind == USER:
            made.add_tokens([AddedToken(text, special=False, normalized=False)])
