"""What becomes of a document: its tokens, its sentences, its tokens with labels, a conversation with labels.

A recipe names the token files it writes and turns records into their content. Labels repeat the tokens; where no loss
is wanted they are -100, so their files are int32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatron.data.indexed.reader import IGNORE_INDEX, dtype_for_vocabulary
from megatron.data.preprocess.conversations import text_bytes_of, turns_of, variables_of
from megatron.data.preprocess.encode import EncodedText, Encoding, InvalidDocument, encode_texts, text_of
from megatron.data.preprocess.ftfy_fast import mended
from megatron.data.preprocess.sentences import Sentences
from megatron.data.preprocess.special_token_search import spells_one

SPELT = "spell special tokens as plain text"
PARSED = "spell special tokens, which are their ids"
WITHOUT_PATTERN = "do not hold the pattern"
LEFT_OUT = "have {!r} that the chat template leaves out"
UNWRITTEN = (
    "have {!r} in a turn that is learnt, of which the chat template leaves out words, so that a model does not learn "
    "them; edit the template so that it writes them"
)
NOTHING_LEARNT = (
    "hold nothing that the role {!r} wrote, so that nothing carries a loss; --generation-role names another"
)
LAST_NOT_LEARNT = (
    "hold nothing that carries a loss, since their last turn is none of the role {!r}, or says so itself; "
    "--generation-role names another role, and without --only-last earlier turns of it are learnt"
)
LABELS = np.dtype("<i4")
NOBODY = ""
"""The role to ask for where it does not matter who wrote what."""


@dataclass(frozen=True)
class PlainText:
    """The text of each key, in token files of its own; a record without text under one of them is left out."""

    tokenizer: Encoding
    """The tokenizer."""
    keys: tuple[str, ...] = ("text",)
    """The fields of a JSON line that hold text; a line must have them all."""
    append_eod: bool = False
    """End each document with the tokenizer's end-of-document id."""
    repair: bool = False
    """Fix broken Unicode with ftfy first."""
    sentences: Sentences | None = None
    """Parts a document into sentences, which become its items."""
    special: tuple[str, ...] = ()
    """The texts of special tokens, so that documents which spell one are counted."""
    parse_special: bool = False
    """What spells one becomes its id, and is no plain text."""

    @property
    def outputs(self) -> tuple[tuple[str, np.dtype[Any]], ...]:
        """`<key>_document`, or `<key>_sentence`."""
        level = "document" if self.sentences is None else "sentence"
        return tuple((f"{key}_{level}", dtype_for_vocabulary(self.tokenizer.vocab_size)) for key in self.keys)

    def read(self, record: Mapping[str, Any]) -> list[str] | None:
        """The texts, or None when one is empty."""
        texts = [text_of(record, key) for key in self.keys]
        if self.repair:
            texts = [mended(text) for text in texts]
        return texts if all(texts) else None

    def encode(self, documents: list[list[str]]) -> tuple[EncodedText, ...]:
        """The tokens of each key."""
        dtype = self.outputs[0][1]
        found = []
        for column in range(len(self.keys)):
            texts = [document[column] for document in documents]
            found.append(self._column(texts, dtype))
        spelt = sum(any(spells_one(text, self.special) for text in document) for document in documents)
        notes = {PARSED if self.parse_special else SPELT: spelt} if spelt else {}
        return (replace(found[0], notes=notes), *found[1:])

    def _column(self, texts: list[str], dtype: np.dtype[Any]) -> EncodedText:
        text_bytes = sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts)
        items = None
        if self.sentences is not None:
            parted = [self.sentences.split(text) for text in texts]
            items = np.array([len(parts) for parts in parted], np.int64)
            texts = [part for parts in parted for part in parts]
        ids = encode_texts(self.tokenizer, texts, parse_special=self.parse_special)
        ends = np.zeros(len(ids), bool)
        if self.append_eod:
            ends[:] = True
            if items is not None:
                ends[:] = False
                ends[np.cumsum(items) - 1] = True
        return _joined(ids, dtype, text_bytes, ends, self.tokenizer.eod, items)


def _joined(
    ids: list[np.ndarray],
    dtype: np.dtype[Any],
    text_bytes: int,
    ends: np.ndarray,
    eod: int,
    items: np.ndarray | None = None,
) -> EncodedText:
    """All ids in one array, with an end of document after those that ask for one."""
    sizes = np.array([len(document) for document in ids], np.int64) + ends
    tokens = np.empty(int(sizes.sum()), dtype)
    at = 0
    for document, end in zip(ids, ends, strict=True):
        tokens[at : at + len(document)] = document
        at += len(document)
        if end:
            tokens[at] = eod
            at += 1
    return EncodedText(tokens, sizes, text_bytes, items)


@dataclass(frozen=True)
class LabelledText:
    """The text of one key and its labels: no loss up to and including the first time that `pattern` occurs."""

    tokenizer: Encoding
    """The tokenizer."""
    pattern: tuple[int, ...]
    """Token ids. A document without it counts whole, and such documents are counted. The rest as for PlainText."""
    keys: tuple[str, ...] = ("text",)
    """The key of the text."""
    append_eod: bool = False
    """Append the end-of-document token."""
    repair: bool = False
    """Fix broken Unicode with ftfy."""
    special: tuple[str, ...] = ()
    """Special tokens of the tokenizer."""
    parse_special: bool = False
    """Encode special tokens that the text spells as such."""

    @property
    def outputs(self) -> tuple[tuple[str, np.dtype[Any]], ...]:
        """`<key>_document` and `label_document`."""
        return (f"{self.keys[0]}_document", LABELS), ("label_document", LABELS)

    def read(self, record: Mapping[str, Any]) -> str | None:
        """The text, or None when it is empty."""
        text = text_of(record, self.keys[0])
        return (mended(text) if self.repair else text) or None

    def encode(self, documents: list[str]) -> tuple[EncodedText, ...]:
        """Tokens and labels."""
        text_bytes = sum(len(text.encode("utf-8")) for text in documents)
        encoded = encode_texts(self.tokenizer, documents, parse_special=self.parse_special)
        ids = [document.astype(LABELS) for document in encoded]
        labels = []
        without = 0
        for document in ids:
            label = document.copy()
            end = end_of_pattern(document, self.pattern)
            without += not end
            label[:end] = IGNORE_INDEX
            labels.append(label)
        ends = np.full(len(ids), self.append_eod)
        eod = self.tokenizer.eod
        found = [_joined(column, LABELS, text_bytes, ends, eod) for column in (ids, labels)]
        spelt = sum(spells_one(text, self.special) for text in documents)
        counts = {PARSED if self.parse_special else SPELT: spelt, WITHOUT_PATTERN: without}
        notes = {what: count for what, count in counts.items() if count}
        return (replace(found[0], notes=notes), *found[1:])


def end_of_pattern(tokens: np.ndarray, pattern: Sequence[int]) -> int:
    """Where the first occurrence of the pattern ends, or 0."""
    last = len(tokens) - len(pattern) + 1
    if last <= 0:
        return 0
    here = np.ones(last, bool)
    for offset, token in enumerate(pattern):
        here &= tokens[offset : offset + last] == token
    found = np.flatnonzero(here)
    return int(found[0]) + len(pattern) if len(found) else 0


class Conversation(Protocol):
    """What the recipe of conversations needs of a chat template."""

    @property
    def eod(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(
        self, turns: Sequence[Mapping[str, Any]], *, role: str, only_last: bool, variables: Mapping[str, Any]
    ) -> tuple[list[int], list[bool]]:
        """The tokens of a conversation, and for each whether the role wrote it. Raises ValueError with a reason.

        Args:
            turns: Messages of the conversation.
            role: Role whose tokens are marked.
            only_last: Mark the last message alone, if the role wrote it.
            variables: Further variables of the chat template.
        """
        ...

    def left_out(self, turns: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> list[str]:
        """The fields for tools and documents that the template has no place for."""
        ...

    def unwritten(
        self, turns: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, role: str, only_last: bool
    ) -> list[str]:
        """The fields of learnt turns with words that the template does not write.

        Args:
            turns: Messages of the conversation.
            variables: Further variables of the chat template.
            role: Role whose turns are learnt.
            only_last: The last turn alone is learnt.
        """
        ...

    def learns_end(self, turns: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> bool:
        """Whether the end of text belongs to the last turn, whose own field lets it carry a loss."""
        ...


class ReadConversation(NamedTuple):
    """A conversation as tokens. notes: what its template leaves out, to be counted."""

    tokens: list[int]
    labels: list[int]
    reward: int | None
    text_bytes: int
    notes: list[str]


def _no_loss(labels: Sequence[int]) -> bool:
    return all(label == IGNORE_INDEX for label in labels)


@dataclass(frozen=True)
class ChatText:
    """Conversations, with loss on what one role says, and rewards where a key names them."""

    template: Conversation
    """Renders and encodes conversations."""
    keys: tuple[str, ...] = ("conversation",)
    """The key of the conversation."""
    role: str = "assistant"
    """The role whose turns are learnt."""
    only_last: bool = False
    """Loss on the last turn alone, if the role wrote it."""
    mask: bool = True
    """False puts a loss on everything."""
    for_reward_model: bool = False
    """Two ends of text and a loss on the last one alone."""
    reward_key: str | None = None
    """The field of a number, and whether it becomes 1 or -1."""
    binary_reward: bool = False
    """The field of a number, and whether it becomes 1 or -1."""

    @property
    def outputs(self) -> tuple[tuple[str, np.dtype[Any]], ...]:
        """`<key>_document`, `<key>_label_document` and, with a reward key, `<key>_reward_document`."""
        kinds = ["document", "label_document", *(["reward_document"] if self.reward_key else [])]
        return tuple((f"{key}_{kind}", LABELS) for key in self.keys for kind in kinds)

    def read(self, record: Mapping[str, Any]) -> list[ReadConversation] | None:
        """What each key holds; the template needs a whole conversation at once. None when one is empty."""
        reward = None if self.reward_key is None else self._reward(record, self.reward_key)
        variables = variables_of(record)
        found = []
        for key in self.keys:
            turns = turns_of(record, key)
            if not turns:
                return None
            asked = (self.role, self.only_last) if self.mask and not self.for_reward_model else (NOBODY, False)
            try:
                tokens, written = self.template.encode(turns, role=asked[0], only_last=asked[1], variables=variables)
                notes = self._losses(turns, variables)
            except ValueError as error:
                raise InvalidDocument("that the chat template cannot take", str(error)) from error
            labels = [
                token if own or not self.mask else IGNORE_INDEX for token, own in zip(tokens, written, strict=True)
            ]
            if self.for_reward_model:
                tokens = [*tokens, self.template.eod]
                labels = [IGNORE_INDEX] * len(tokens)
            end = self.template.eod
            ends = [*tokens, end], [*labels, end if self._learns_end(turns, variables) else IGNORE_INDEX]
            found.append(ReadConversation(*ends, reward, text_bytes_of(turns), notes))
        return found

    def _losses(self, turns: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> list[str]:
        """What the template leaves out of a conversation, as notes."""
        only_last = self.only_last and self.mask and not self.for_reward_model
        unwritten = self.template.unwritten(turns, variables, role=self.role, only_last=only_last)
        notes = [LEFT_OUT.format(name) for name in self.template.left_out(turns, variables)]
        return notes + [UNWRITTEN.format(name) for name in unwritten]

    def _learns_end(self, turns: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> bool:
        """Whether the end of text is learnt: as a part of the last turn, where that is."""
        if self.for_reward_model or not self.mask:
            return True
        return turns[-1]["role"] == self.role and self.template.learns_end(turns, variables)

    def encode(self, documents: list[Any]) -> tuple[EncodedText, ...]:
        """Tokens, labels and rewards of each key."""
        texts = []
        for column in range(len(self.keys)):
            found: list[ReadConversation] = [document[column] for document in documents]
            columns = [[each.tokens for each in found], [each.labels for each in found]]
            if self.reward_key is not None:
                columns.append([[each.reward or 0] for each in found])
            text_bytes = sum(each.text_bytes for each in found)
            no_ends = np.zeros(len(found), bool)
            texts += [
                _joined([np.array(row, LABELS) for row in rows], LABELS, text_bytes, no_ends, 0) for rows in columns
            ]
        found_notes = [{note for each in document for note in each.notes} for document in documents]
        notes = dict(Counter(note for each in found_notes for note in each))
        if self.mask and not self.for_reward_model:
            bare = sum(any(_no_loss(each.labels[:-1]) for each in document) for document in documents)
            why = LAST_NOT_LEARNT if self.only_last else NOTHING_LEARNT
            notes |= {why.format(self.role): bare} if bare else {}
        return replace(texts[0], notes=notes), *texts[1:]

    def _reward(self, record: Mapping[str, Any], key: str) -> int:
        value = record.get(key)
        if self.binary_reward and isinstance(value, bool | int | float):
            return 1 if value else -1
        if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
            return int(value)
        raise InvalidDocument(f"whose {key!r} is not a whole number", f"it is {value!r}"[:80])
