"""Tokens that a folder adds to its vocabulary beside tokenizer.json, or beside vocab.json and merges.txt.

`added_tokens_decoder` in tokenizer_config.json says them, in earlier folders added_tokens.json; special tokens that are
named and that the vocabulary does not have are added as well. They get the ids behind the vocabulary, in that order.

Source: transformers 5.23, tokenization_utils_base.py (_from_pretrained) and tokenization_utils_tokenizers.py.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from megatron.errors import ConfigError
from megatron.tokenizers.tokenizer_config import (
    CONFIG,
    NAMES,
    named_tokens,
    read_settings,
    token_text,
    tokens_of_one_use,
)

ADDED = "added_tokens.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_tokens(tokenizer: FastTokenizer, files: Mapping[str, Path], name: str) -> None:
    """Adds what the folder adds. name: of the folder, for messages. Raises ConfigError when a file is damaged."""
    settings = read_settings(files.get(CONFIG, files.get(NAMES)))
    special = {token_text(token) or "": token for token in reversed([*named_tokens(settings)])}
    own = tokenizer.get_added_tokens_decoder().values()
    retained = {token.content for token in own if token.special}  # the library never takes that back
    described = {repr(token) for token in own}
    added = [token for token in _listed(settings, files.get(ADDED), special, name) if repr(token) not in described]
    known = {token.content for token in (*own, *added)}
    added += [_described(special[text]) for text in reversed(special) if text not in known]
    for token in added:
        token.special = token.special or token.content in special or token.content in retained
    tokenizer.add_tokens(added)
    ordinary = {token.content for token in own if not token.special}
    used = (token for token in tokens_of_one_use(settings) if token_text(token) in ordinary)
    tokenizer.add_special_tokens([_as_special(token) for token in used])


def _listed(settings: Mapping[str, Any], file: Path | None, special: Container[str], name: str) -> list[AddedToken]:
    """The tokens that are listed with their ids, in the order of these."""
    try:
        decoder = settings.get("added_tokens_decoder")
        if isinstance(decoder, Mapping):
            described = {int(number): token for number, token in decoder.items() if token_text(token) is not None}
            return [_described(described[number]) for number in sorted(described)]
        if file is None:
            return []
        ids = {str(text): int(number) for text, number in json.loads(file.read_text(encoding="utf-8")).items()}
        return [
            AddedToken(text, normalized=text not in special, special=text in special)
            for text in sorted(ids, key=ids.__getitem__)
        ]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        what = f"the added tokens of this folder cannot be read ({error})"
        hint = f"{ADDED} maps tokens to ids, as transformers writes it"
        raise ConfigError.of(what, key="vocab_file", value=name, hint=hint) from error


def _as_special(token: Any) -> AddedToken:
    """Returns a named token as a special one."""
    if isinstance(token, Mapping):
        return _described({**token, "special": True})
    return AddedToken(str(token), special=True, normalized=False)


def _described(token: Any) -> AddedToken:
    if not isinstance(token, Mapping):
        return AddedToken(str(token), special=True)
    return AddedToken(str(token["content"]), **{flag: token[flag] for flag in _FLAGS if flag in token})
