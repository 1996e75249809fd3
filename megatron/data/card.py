"""What is known about a pair of token files that the files themselves do not say: `<prefix>.json` beside them.

It holds no time and no path, so that the same text and tokenizer always give the same bytes. Readers live without it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class DatasetCard:
    """documents and tokens: as in the files. text_bytes: UTF-8 bytes of the text that the tokens stand for.

    eod: the id that ends each document, or None when none was appended. vocab_size: [tokens], before padding.
    """

    documents: int
    tokens: int
    text_bytes: int
    tokenizer_type: str
    vocab_size: int
    eod: int | None

    @property
    def bytes_per_token(self) -> float:
        """Text bytes that one token stands for on average, ends of documents counted as tokens."""
        return self.text_bytes / self.tokens if self.tokens else 0.0

    def to_json(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self), indent=1) + "\n"


def card_path(prefix: str | Path) -> Path:
    """`<prefix>.json`."""
    return Path(f"{prefix}.json")


def read_card(prefix: str | Path, *, documents: int, tokens: int) -> DatasetCard | None:
    """The card of a pair of files with that many documents and tokens, or None when there is none that fits."""
    try:
        found = DatasetCard(**json.loads(card_path(prefix).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if (found.documents, found.tokens) == (documents, tokens) else None
