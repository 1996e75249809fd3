"""Metadata of a pair of token files: `<prefix>.json` beside them.

It holds no time and no path, so that the same text and tokenizer always give the same bytes. Readers live without it;
where it exists, the run must use the tokenizer that it names.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron.tokenizer_info import TokenizerInfo


@dataclass(frozen=True)
class DatasetCard:
    """documents and tokens: as in the files. text_bytes: UTF-8 bytes of the text that the tokens stand for.

    eod: the id that ends each document, or None when none was appended. vocab_size: [tokens], before padding.
    fingerprint: of the tokenizer (TokenizerInfo); cards of earlier versions have none.
    """

    documents: int
    """Documents in the files."""
    tokens: int
    """Tokens in the files."""
    text_bytes: int
    """UTF-8 bytes of the text."""
    tokenizer_type: str
    """Kind of the tokenizer."""
    vocab_size: int
    """Tokens of the vocabulary."""
    eod: int | None
    """The id that ends a document."""
    fingerprint: str | None = None
    """Hash of the ids of a fixed text."""

    @property
    def bytes_per_token(self) -> float:
        """Text bytes that one token stands for on average, ends of documents counted as tokens."""
        return self.text_bytes / self.tokens if self.tokens else 0.0

    @property
    def tokenizer(self) -> TokenizerInfo:
        """What is written down about the tokenizer."""
        return TokenizerInfo(self.tokenizer_type, self.vocab_size, self.eod, self.fingerprint)

    def to_json(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self), indent=1) + "\n"


def card_path(prefix: str | Path) -> Path:
    """`<prefix>.json`."""
    return Path(f"{prefix}.json")


def read_card(prefix: str | Path, *, documents: int, tokens: int) -> DatasetCard | None:
    """The card of a pair of files with that many documents and tokens, or None when there is none that fits."""
    known = {field.name for field in fields(DatasetCard)}
    try:
        content = json.loads(card_path(prefix).read_text(encoding="utf-8"))
        found = DatasetCard(**{name: value for name, value in content.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return found if (found.documents, found.tokens) == (documents, tokens) else None
