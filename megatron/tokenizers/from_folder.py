"""What tokenizer the folder of a model holds, as our keys.

tokenizer.json is read as PretrainedFromHF. GPT-2's two files are GPT2BPETokenizer where that gives the same ids; with
tokens added beside them they become a tokenizer.json. A .model is SPMTokenizer, or TiktokenTokenizer where it is a list
of ranks; a sentencepiece model with tokens added beside it becomes a tokenizer.json too. Nothing is believed before the
tokenizer was built once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as FastTokenizer

from megatron.errors import ConfigError
from megatron.tokenizer_info import describe_tokenizer
from megatron.tokenizers.added_tokens import ADDED, add_tokens
from megatron.tokenizers.base import END_OF_DOCUMENT, Tokenizer
from megatron.tokenizers.builder import make_tokenizer
from megatron.tokenizers.gpt2 import gpt2_bpe
from megatron.tokenizers.sentence_piece import SPMTokenizer
from megatron.tokenizers.sentence_piece_json import as_tokenizer_json
from megatron.tokenizers.tokenizer_classes import (
    T5,
    class_of,
    post_processor_of,
    sentinels_of,
    split_by_class,
    splits_as_gpt2,
)
from megatron.tokenizers.tokenizer_config import MODEL, NAMES, read_beside, read_object

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
_VOCABULARY, _MERGES = ("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")
_SHOWN = 8
_MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class FoundTokenizer:
    """keys: tokenizer_type and its files; empty where there is none. tokenizer: built of them.

    reason: why there is none, or which tokens of the folder it lacks.
    """

    keys: dict[str, str] = field(default_factory=dict)
    """tokenizer_type and its files; empty where there is none."""
    tokenizer: Tokenizer | None = None
    """The tokenizer, if any."""
    reason: str = ""
    """Why there is none, or which tokens of the folder it lacks."""


def find_tokenizer(folder: Path, ends: Sequence[int] = (), *, complete: bool = False) -> FoundTokenizer:
    """The tokenizer of a folder.

    ends: ids that end a text, by the model's own files; the first names the end where the tokenizer's files do not.
    complete: the folder is ours, and may be given what it lacks: that name, or a tokenizer.json.
    """
    reasons = []
    for kind, files in _candidates(folder.resolve(), ends, complete):
        try:
            made = make_tokenizer(kind, **files)
            lost = lost_tokens(folder, made) if files["vocab_file"].endswith(".model") else ""
            return FoundTokenizer({"tokenizer_type": kind, **files}, made, lost)
        except ConfigError as error:
            reasons.append(str(error))
    return FoundTokenizer(reason="; ".join(reasons[:1]) or f"{folder} holds no tokenizer that is understood")


def require_same_tokenizer(folder: Path, other: Path) -> None:
    """Raises ConfigError where both folders have a tokenizer, and these differ."""
    found = [find_tokenizer(path) for path in (folder, other)]
    known = [describe_tokenizer(each.keys["tokenizer_type"], each.tokenizer) for each in found if each.tokenizer]
    if len(known) == 2 and not known[0].agrees_with(known[1]):
        what = f"this tokenizer is {known[1]}, and that of {folder} {known[0]}"
        hint = "one tokenizer reads the texts of both: give models that were trained with the same one"
        raise ConfigError.of(what, location=str(other), hint=hint)


def lost_tokens(folder: Path, tokenizer: Tokenizer) -> str:
    """A line that names the tokens which the folder adds to its .model and the tokenizer lacks; "" without any."""
    lost = sorted(token for token, number in _added(folder).items() if number >= tokenizer.vocab_size)
    if not lost:
        return ""
    more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    return f"{folder}: {', '.join(lost[:_SHOWN])}{more} are added beside a .model, which is read without: as text"


def named_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token and the like, as special_tokens_map.json and tokenizer_config.json spell them."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", CONFIG):
        for key, value in read_object(folder / name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


def _candidates(folder: Path, ends: Sequence[int], complete: bool) -> Iterator[tuple[str, dict[str, str]]]:
    """Kinds of ours and their files, the likeliest first."""
    tokenizer_json = folder / TOKENIZER
    vocabulary, merges = (_first(folder, names) for names in (_VOCABULARY, _MERGES))
    if not tokenizer_json.is_file() and vocabulary is not None and merges is not None:
        if _is_plain(folder, vocabulary, ends):
            yield "GPT2BPETokenizer", {"vocab_file": str(vocabulary), "merge_file": str(merges)}
            return
        if complete:
            _write_tokenizer_json(folder, vocabulary, merges)
        if not tokenizer_json.is_file():
            yield "PretrainedFromHF", {"vocab_file": str(folder)}
    model = _first(folder, _MODELS) or next(iter(sorted(folder.glob("*.model"))), None)
    if complete and model is not None and not tokenizer_json.is_file():
        _write_tokenizer_json_of_model(folder, model)
    if tokenizer_json.is_file():
        if complete:
            _name_end(folder, tokenizer_json, ends)
        yield "PretrainedFromHF", {"vocab_file": str(tokenizer_json)}
    elif model is not None:
        yield "SPMTokenizer", {"vocab_file": str(model)}
        yield "TiktokenTokenizer", {"vocab_file": str(model)}


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _added(folder: Path) -> dict[str, int]:
    """Tokens that files beside the vocabulary add, and their ids."""
    found = {str(token): int(number) for token, number in read_object(folder / "added_tokens.json").items()}
    decoder = read_object(folder / CONFIG).get("added_tokens_decoder")
    for number, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            found[entry["content"]] = int(number)
    return found


def _beside(folder: Path) -> dict[str, Path]:
    """The files that may add tokens, by their names."""
    return {name: folder / name for name in (CONFIG, ADDED, NAMES) if (folder / name).is_file()}


def _is_plain(folder: Path, vocabulary: Path, ends: Sequence[int]) -> bool:
    """Whether GPT-2's two files say all: its end, no further tokens, nothing put before a text."""
    ids, config = read_object(vocabulary), read_object(folder / CONFIG)
    number = ids.get(END_OF_DOCUMENT)
    named = named_tokens(folder).get("eos_token")
    ended = number is not None and (named == END_OF_DOCUMENT if named else not ends or number in ends)
    more = any(ids.get(token) != number for token, number in _added(folder).items())
    more = more or any(token not in ids for token in read_beside(folder / CONFIG).special)
    plain = not config.get("add_prefix_space") and not config.get("add_bos_token") and splits_as_gpt2(folder)
    return ended and not more and plain


def _write_tokenizer_json(folder: Path, vocabulary: Path, merges: Path) -> None:
    """tokenizer.json of GPT-2's two files and what is beside them. Nothing where they are damaged."""
    try:
        texts = [path.read_text(encoding="utf-8") for path in (vocabulary, merges)]
        made = gpt2_bpe(texts[0], texts[1], str(vocabulary), str(merges))
        made.pre_tokenizer.add_prefix_space = bool(read_object(folder / CONFIG).get("add_prefix_space"))
        split_by_class(made, class_of(folder / CONFIG, folder / MODEL), str(folder))
        add_tokens(made, _beside(folder), str(folder))
    except (OSError, UnicodeDecodeError, ConfigError):
        return
    if made.token_to_id(END_OF_DOCUMENT) is not None:
        made.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    _save(folder, made)


def _write_tokenizer_json_of_model(folder: Path, model: Path) -> None:
    """tokenizer.json of a sentencepiece model that tokens are added to, which a .model cannot say.

    Nothing where there are no such tokens nor T5's class, and where the model is another or none gives the same ids.
    """
    try:
        tokenizer = SPMTokenizer(str(model))
    except ConfigError:
        return
    sentinels = sentinels_of(folder, tokenizer.vocab_size)
    further = {token: number for token, number in _added(folder).items() if number >= tokenizer.vocab_size}
    ends = class_of(folder / CONFIG, folder / MODEL) == T5
    content = as_tokenizer_json(tokenizer, model) if further or ends else None
    if content is None:
        return
    made = FastTokenizer.from_str(content)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in sentinels])
    add_tokens(made, _beside(folder), str(folder))
    if all(made.token_to_id(token) == number for token, number in {**sentinels, **further}.items()):
        _save(folder, made)


def _save(folder: Path, made: FastTokenizer) -> None:
    """Writes the tokenizer.json, with what the class or tokenizer_config.json puts around a text."""
    named = named_tokens(folder)
    begin = named.get("bos_token")
    number = None if begin is None else made.token_to_id(begin)
    if read_object(folder / CONFIG).get("add_bos_token") and number is not None:
        made.post_processor = processors.TemplateProcessing(
            single=[begin, "$A"], pair=[begin, "$A", begin, "$B"], special_tokens=[(begin, number)]
        )
    around = post_processor_of(made, class_of(folder / CONFIG, folder / MODEL), named)
    if around is not None:
        made.post_processor = around
    (folder / TOKENIZER).write_text(made.to_str(), encoding="utf-8")


def _name_end(folder: Path, tokenizer_json: Path, ends: Sequence[int]) -> None:
    """Writes eos_token into tokenizer_config.json where the files name no token that the vocabulary has."""
    config, content = read_object(folder / CONFIG), read_object(tokenizer_json)
    vocabulary = content.get("model", {}).get("vocab", {}) if isinstance(content.get("model"), dict) else {}
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    ids |= {entry["content"]: entry["id"] for entry in content.get("added_tokens", ())}
    named = named_tokens(folder).get("eos_token")
    if named not in ids:
        named = next((token for token, number in ids.items() if number in ends[:1]), None)
    own = config.get("eos_token")
    if named is not None and (own.get("content") if isinstance(own, dict) else own) != named:
        text = json.dumps({**config, "eos_token": named}, ensure_ascii=False, indent=1)
        (folder / CONFIG).write_text(text, encoding="utf-8")
