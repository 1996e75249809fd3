"""Perplexity a word, and the share of last words that are guessed, from local files.

Perplexity a word follows the WikiText tables of Megatron-LM (tasks/zeroshot_gpt): the text is freed of its spaced-out
punctuation, cut into overlapping windows, and the loss of all tokens is spread over the words of the file as it stands,
parted by blanks. It does not depend on the tokenizer, and equals published figures only for the same files.

Cloze accuracy follows LAMBADA (arXiv:1606.06031) in its strict form: the model must give the whole last word, token by
token, from the text before it alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.errors import ConfigError
from megatron.inference.scoring import Pair, Score, windows
from megatron.metrics.reporter import perplexity
from megatron.tokenizers.base import Tokenizer

Scorer = Callable[[list[Pair]], list[Score]]

# What WikiText puts blanks around, in the order in which Megatron-LM takes them away.
_PLAIN = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
)
_BRACKETS = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


@dataclass(frozen=True)
class Perplexity:
    """nats: of all scored tokens. tokens: scored. words: of the file, without the first."""

    nats: float
    """Negative log-likelihood of all scored tokens [nats]."""
    tokens: int
    """Number of scored tokens."""
    words: int
    """Number of words of the text."""

    @property
    def a_token(self) -> float:
        return perplexity(self.nats / self.tokens)

    @property
    def a_word(self) -> float:
        return perplexity(self.nats / self.words)


def detokenised(text: str) -> str:
    """A WikiText file as people would have written it."""
    for old, new in _PLAIN:
        text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text.replace(old, new)) if old == "s '" else text.replace(old, new)
    for pattern, form in _BRACKETS:
        text = re.sub(pattern, form, text)
    for old, new in _REST:
        text = text.replace(old, new)
    return text


def word_perplexity(text: str, tokenizer: Tokenizer, scorer: Scorer, *, max_length: int, overlap: int) -> Perplexity:
    """Of one text, its first token left out, which has nothing before it.

    Raises ConfigError for a text of less than two words.

    Args:
        text: The text.
        tokenizer: The run's tokenizer.
        scorer: Scores sequences of tokens.
        max_length: Context of the model [tokens].
        overlap: Tokens that each window after the first scores [tokens].
    """
    words = len(text.strip().split(" ")) - 1
    tokens = [*tokenizer.prefix_ids, *tokenizer.encode(detokenised(text))]
    if words < 1 or len(tokens) < 2:
        raise ConfigError.of("the text has less than two words", key="eval_text")
    pairs = list(windows(tokens[:1], tokens[1:], max_length, min(overlap, max_length)))
    nats = -math.fsum(each.log_likelihood for each in scorer(pairs))
    return Perplexity(nats, len(tokens) - 1, words)


def cloze_pairs(texts: Sequence[str], tokenizer: Tokenizer) -> list[Pair]:
    """For each text, what is before its last word, and that word with the blank before it.

    The word's tokens are those behind the others in the whole text: alone, some tokenizers put a blank of their own
    before it. Raises ConfigError for a text of one word.
    """
    pairs = []
    for number, text in enumerate(texts, 1):
        words = text.split()
        if len(words) < 2:
            raise ConfigError.of(f"text {number} has no word before its last one", key="eval_cloze")
        before = text[: text.rindex(words[-1])].strip()
        context, last = tokenizer.encode(before), f" {words[-1]}"
        full = tokenizer.encode(before + last)
        pairs.append(Pair((*tokenizer.prefix_ids, *context), tuple(full[len(context) :] or tokenizer.encode(last))))
    return pairs


def cloze_accuracy(texts: Sequence[str], tokenizer: Tokenizer, scorer: Scorer) -> float:
    """The share of texts whose last word is the model's likeliest, in every token."""
    found = scorer(cloze_pairs(texts, tokenizer))
    return sum(each.greedy for each in found) / len(found)
