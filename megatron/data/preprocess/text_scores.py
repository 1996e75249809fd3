"""Scores of texts between 0 and 1, such as how toxic each is, by a scorer that a YAML file names.

scorer: words                       # the share of a text's words that are in a list
words: words.txt                    # a file with a word a line, or a list
scorer: profanity_check:predict_prob    # or a function of an installed package: texts -> scores
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError

WORDS = "words"
KEYS = frozenset({"scorer", WORDS, "keep", "threshold"})
Scorer = Callable[[Sequence[str]], list[float]]
_WORD = re.compile(r"\w+")


def make_scorer(settings: Mapping[str, Any], location: str) -> Scorer:
    """Returns the scorer that the settings name. location: their file, for messages.

    Raises ConfigError for unknown keys, and for words or a function that are not found.
    """
    unknown = sorted(set(settings) - KEYS)
    if unknown:
        raise ConfigError.of(
            f"there is no such key: {', '.join(unknown)}", location=location, hint=f"keys are {', '.join(sorted(KEYS))}"
        )
    name = settings.get("scorer")
    if name == WORDS:
        return _by_words(_listed(settings.get(WORDS), location))
    module, colon, function = str(name or "").partition(":")
    if not colon:
        raise ConfigError.of(
            "this is no scorer", key="scorer", value=name, location=location, hint="write words, or module:function"
        )
    return _by_function(module, function, location)


def _by_words(words: frozenset[str]) -> Scorer:
    def score(texts: Sequence[str]) -> list[float]:
        found = [[word.casefold() in words for word in _WORD.findall(text)] for text in texts]
        return [sum(listed) / len(listed) if listed else 0.0 for listed in found]

    return score


def _listed(words: Any, location: str) -> frozenset[str]:
    """Returns the words of a list, or of a file with one a line."""
    if isinstance(words, str):
        path = Path(location).parent / words
        try:
            words = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            what, hint = f"cannot be read ({error.strerror})", "name a file with a word a line, beside this one"
            raise ConfigError.of(what, key=WORDS, value=str(path), location=location, hint=hint) from error
    listed = frozenset(str(word).strip().casefold() for word in words or () if str(word).strip())
    several = sorted(word for word in listed if not _WORD.fullmatch(word))
    if not listed or several:
        what = f"{several[0]!r} is no single word" if several else "there is no word"
        raise ConfigError.of(what, key=WORDS, location=location, hint="list single words, without blanks or marks")
    return listed


def _by_function(module: str, function: str, location: str) -> Scorer:
    try:
        score = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        hint = f"install the package that has {module}, or write words"
        raise ConfigError.of(
            f"cannot be imported ({error})", key="scorer", value=f"{module}:{function}", location=location, hint=hint
        ) from error

    def checked(texts: Sequence[str]) -> list[float]:
        scores = [float(one) for one in score(list(texts))]
        if len(scores) != len(texts) or not all(math.isfinite(one) for one in scores):
            raise ConfigError.of(
                f"{len(texts)} texts got {len(scores)} scores, or some that are no numbers",
                key="scorer",
                value=f"{module}:{function}",
                location=location,
                hint="name a function that maps a list of texts to as many numbers",
            )
        return scores

    return checked
