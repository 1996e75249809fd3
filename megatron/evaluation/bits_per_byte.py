"""How well a model predicts a text, in bits for each byte of it, beside what compressors reach.

Bits per byte do not depend on the tokenizer, so that models with different ones, and compressors, can be compared: a
model that gives a text L nats could encode it, with an arithmetic coder, in L / ln 2 bits. Each token counts once, with
at least half of the model's context before it where the document reaches that far back. The end of each document is a
token and counts too.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.engine.engine import Engine
from megatron.errors import ConfigError
from megatron.inference.scoring import Pair, Score, require_numbers, score, windows
from megatron.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class BitsPerByte:
    """nats: of all tokens together. tokens: how many, ends of documents included. bytes: of the text in UTF-8."""

    nats: float
    """Negative log-likelihood of all tokens [nats]."""
    tokens: int
    """Number of tokens, ends of documents included."""
    bytes: int
    """UTF-8 bytes of the texts."""

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens


def read_documents(path: str | None, text_key: str = "text") -> list[str]:
    """The documents of a file: one a line under `text_key` in .jsonl, else the whole file is one.

    Raises ConfigError when the file cannot be read or holds no text.
    """
    if path is None:
        raise ConfigError.of("needs a text to measure", key="eval_text", value=path, hint="--eval-text FILE")
    try:
        content = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError.of(f"cannot read the text ({reason})", key="eval_text", value=path) from error
    if Path(path).suffix != ".jsonl":
        documents = [content]
    else:
        lines = [line for line in enumerate(content.split("\n"), 1) if line[1].strip()]
        documents = [_document(line, f"{path}:{number}", text_key) for number, line in lines]
    documents = [document for document in documents if document]
    if not documents:
        raise ConfigError.of("the file holds no text", key="eval_text", value=path)
    return documents


def _document(line: str, location: str, text_key: str) -> str:
    try:
        text = json.loads(line)[text_key]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError.of(f"this is no JSON object with a {text_key}", key="eval_text", location=location) from error
    if not isinstance(text, str):
        raise ConfigError.of(f"the {text_key} is no string", key="eval_text", location=location)
    return text


def measure(
    engine: Engine,
    tokenizer: Tokenizer,
    documents: Sequence[str],
    *,
    max_length: int,
    batch_size: int,
    vocabulary: int | None = None,
    share: tuple[int, int] = (0, 1),
    add_up: Callable[[float], float] = float,
    on_progress: Callable[[float], None] | None = None,
) -> BitsPerByte:
    """Runs the model over all documents.

    Raises RunError where the model's scores are not numbers.

    Args:
        engine: The model.
        tokenizer: The run's tokenizer.
        documents: The texts.
        max_length: Context of the model [tokens].
        batch_size: Sequences in one forward pass.
        vocabulary: The ids that exist, the tokenizer's unless given [tokens].
        share: (k, n) when n replicas of the model divide the work and this is the k-th; add_up then sums a number over
            them.
        add_up: Sums values over the data-parallel ranks.
        on_progress: Called with the fraction that is done.
    """
    pairs: list[Pair] = []
    tokens = 0
    for encoded in tokenizer.encode_batch(documents):
        tokens += len(encoded) + 1
        pairs += windows([tokenizer.begin], [*encoded, tokenizer.eod], max_length, max(1, max_length // 2))
    number, replicas = share
    found = score(
        engine,
        pairs[number::replicas],
        max_length=max_length,
        batch_size=batch_size,
        padding=tokenizer.eod,
        vocabulary=vocabulary or tokenizer.vocab_size,
        on_progress=on_progress,
    )
    nats = -add_up(math.fsum(each.log_likelihood for each in found))
    require_numbers([Score(nats, False)], "texts")
    return BitsPerByte(nats, tokens, sum(len(document.encode("utf-8")) for document in documents))


def compressors(documents: Sequence[str]) -> dict[str, float]:
    """Bits per byte of all documents in one stream: `gzip -9` and `xz -9e`."""
    data = "".join(documents).encode("utf-8")
    sizes = {
        "gzip -9": len(gzip.compress(data, compresslevel=9, mtime=0)),
        "xz -9e": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def comparison(measured: BitsPerByte, others: dict[str, float], documents: int) -> str:
    """The figures side by side, as text."""
    lines = [
        f"text      {measured.bytes:,} bytes in {documents:,} documents, {measured.tokens:,} tokens",
        f"model     {measured.bits_per_byte:.4f} bits per byte ({measured.nats_per_token:.4f} nats a token)",
    ]
    lines += [f"{name:<9} {bits:.4f} bits per byte" for name, bits in others.items()]
    return "\n".join(lines)
