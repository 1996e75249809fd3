"""The tokenizer and the rows of the embedding of a run, which a checkpoint may determine."""

from __future__ import annotations

from megatron.checkpoint.load.vocabulary import existing_ids, vocabulary_rows
from megatron.config import Config
from megatron.config.derived.vocabulary import padded_vocab_size
from megatron.config.schema.tokenizer import TokenizerSection
from megatron.distributed.mesh import Topology
from megatron.errors import ConfigError
from megatron.log import get_logger
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.vocab_limit import BoundedTokenizer, known_ids

_log = get_logger(__name__)


def build_vocabulary(
    config: Config, topology: Topology, tokenizer: Tokenizer, *, may_grow: bool = False
) -> tuple[Tokenizer, int]:
    """Returns the tokenizer and the rows of the embedding; a checkpoint at `load` determines both.

    Args:
        config: full configuration.
        topology: layout of the ranks.
        tokenizer: tokenizer of the run.
        may_grow: true if tokens beyond the rows of the checkpoint get new rows; otherwise texts with them are rejected.
    """
    rows = padded_vocab_size(tokenizer.vocab_size, config.tokenizer.make_vocab_size_divisible_by, topology.model.size)
    tokens = tokenizer.vocab_size
    found = vocabulary_rows(config, rows, tokens=tokens, model_size=topology.model.size, may_grow=may_grow)
    _check_vocabulary(config.tokenizer, tokens, found.rows)
    return tokenizer if found.known == tokens else BoundedTokenizer(tokenizer, found.known), found.rows


def vocabulary_size(config: Config, tokenizer: Tokenizer, rows: int | None = None) -> int:
    """Returns how many ids exist [tokens]; the further rows of an embedding only pad it, and get no probability.

    A model that was trained elsewhere may have more ids than its tokenizer; as in `transformers`, these have
    probability in training, evaluation and generation.

    Args:
        config: full configuration.
        tokenizer: tokenizer of the run, as `build_vocabulary` returns it.
        rows: rows of the embedding; those of the checkpoint unless set.
    """
    return existing_ids(config, known_ids(tokenizer), rows)


def _check_vocabulary(section: TokenizerSection, tokens: int, rows: int) -> None:
    """Compares the configured vocabulary size with the actual one. Raises ConfigError for a different number of rows.

    tokens: of the tokenizer. rows: of the embedding [tokens].
    """
    if section.padded_vocab_size not in (None, rows):
        raise ConfigError.of(
            f"the embedding has {rows:,} rows, for the {tokens:,} tokens of the tokenizer",
            key="padded_vocab_size",
            value=section.padded_vocab_size,
            hint="leave it out: it follows from the tokenizer, make_vocab_size_divisible_by and model_parallel_size",
        )
    if section.vocab_size is not None and not tokens <= section.vocab_size <= rows:
        message = "vocab_size = %d: has no effect; the tokenizer has %d tokens"
        _log.warning(message, section.vocab_size, tokens)
