"""BertWordPieceLowerCase and BertWordPieceCase: the word pieces of BERT, from its vocab.txt.

Words are parted at spaces and punctuation, control characters vanish and, lower-cased, accents do too: decoding does
not give the text back. `[SEP]` ends a document, `[UNK]` stands for words that the vocabulary cannot spell.

Source: arXiv:1810.04805.
"""

from __future__ import annotations

from itertools import count, takewhile
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from megatron.errors import ConfigError
from megatron.tokenizers.fast import FromTokenizers, read_file
from megatron.tokenizers.tokenizer_config import Beside, read_beside

END = "[SEP]"
UNKNOWN = "[UNK]"
SPECIAL = ("[PAD]", UNKNOWN, "[CLS]", END, "[MASK]")
"""Special tokens of a vocabulary, those that it has."""
OF_SPANS = ("[BOS]", "[EOS]")
"""Those that a vocabulary for span corruption has besides, and sentinels."""


def sentinel(number: int) -> str:
    """Returns the token that stands for span `number`, from 0."""
    return f"<extra_id_{number}>"


def span_special(count: int) -> list[str]:
    """Returns the tokens that span corruption adds to a vocabulary. count: sentinels."""
    return [*OF_SPANS, *(sentinel(number) for number in range(count))]


class WordPieces(FromTokenizers):
    """What both kinds share: how a tokenizer.json is written of a vocab.txt."""

    @property
    def roles(self) -> dict[str, Any]:
        """The special tokens by the names that tokenizer_config.json gives them, and that texts have token types."""
        named = {"unk_token": UNKNOWN, "cls_token": "[CLS]", "sep_token": END, "pad_token": "[PAD]"}
        named |= {"mask_token": "[MASK]"}
        found = {role: text for role, text in named.items() if self.id_of(text) is not None}
        return {**found, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}

    def to_json(self, file: str | None = None) -> str:
        """The text of a tokenizer.json, which puts `[CLS] [SEP]` around a text and `[SEP]` behind a second one.

        A vocabulary with sentinels is an encoder-decoder's, which reads a text as it is.
        """
        made = FastTokenizer.from_str(super().to_json(file))
        cls = self.id_of("[CLS]")
        if cls is not None and self.id_of(sentinel(0)) is None:
            made.post_processor = processors.TemplateProcessing(
                single=f"[CLS] $A {END}",
                pair=f"[CLS] $A {END} $B:1 {END}:1",
                special_tokens=[("[CLS]", cls), (END, self.eod)],
            )
        content: str = made.to_str()
        return content


class BertWordPieceLowerCase(WordPieces):
    """Lower-cased word pieces, without accents. Raises ConfigError when vocab.txt is missing or lacks a token."""

    def __init__(self, vocab_file: str | None = None, merge_file: str | None = None) -> None:
        super().__init__(
            _word_pieces("BertWordPieceLowerCase", vocab_file, lower=True), END, vocab_file, _beside(vocab_file)
        )


class BertWordPieceCase(WordPieces):
    """Word pieces in the text's own case. Raises as the other."""

    def __init__(self, vocab_file: str | None = None, merge_file: str | None = None) -> None:
        super().__init__(
            _word_pieces("BertWordPieceCase", vocab_file, lower=False), END, vocab_file, _beside(vocab_file)
        )


def _beside(vocab_file: str | None) -> Beside:
    """What a tokenizer_config.json says of the reading; the special tokens are those of the kind."""
    return Beside(splits_special=read_beside(vocab_file).splits_special)


def _word_pieces(kind: str, vocab_file: str | None, *, lower: bool) -> FastTokenizer:
    content = read_file(vocab_file, kind=kind, key="vocab_file", needs="BERT's vocab.txt, a token a line")
    tokens = [line.rstrip("\r") for line in content.removesuffix("\n").split("\n")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    missing = [token for token in (UNKNOWN, END) if token not in vocabulary]
    if missing:
        raise ConfigError.of(
            f"this is not BERT's vocab.txt: it lacks {' and '.join(missing)}",
            key="vocab_file",
            value=vocab_file,
            hint="give the vocab.txt of a BERT model",
        )
    tokenizer = FastTokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    sentinels = takewhile(vocabulary.__contains__, map(sentinel, count()))
    special = [*(token for token in (*SPECIAL, *OF_SPANS) if token in vocabulary), *sentinels]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer
