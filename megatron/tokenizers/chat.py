"""Conversations as tokens, by a model's chat template, with what one role wrote marked.

The template (Jinja, in tokenizer_config.json or chat_template.jinja) is rendered in a sandbox. Where a turn lies in
the rendered text is found by rendering the conversation turn by turn; the tokens of that stretch of text are its own.
A turn of the marked role counts from behind the words with which the template opens it, as in generation, to its end.

Source: https://huggingface.co/docs/transformers/chat_templating.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron.errors import ConfigError
from megatron.tokenizers.fast import parse

TEMPLATE = "chat_template.jinja"


class ChatTemplate:
    """The template and the tokenizer of a folder. Raises ConfigError when one is missing or is none.

    eod: the model's end-of-text token. vocab_size: [tokens].
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        place = Path(folder)
        config = _json(place / "tokenizer_config.json", folder)
        self._tokenizer = parse(_text(place / "tokenizer.json", folder), folder)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = {
            name: _token(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        end = self._special["eos_token"]
        number = None if end is None else self._tokenizer.token_to_id(end)
        if number is None:
            self._refuse("tokenizer_config.json names no eos_token that the vocabulary has")
        self.eod: int = number
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        source = (place / TEMPLATE).read_text(encoding="utf-8") if (place / TEMPLATE).is_file() else None
        source = source or config.get("chat_template")
        if not isinstance(source, str):
            self._refuse(f"there is no chat template, neither {TEMPLATE} nor in tokenizer_config.json")
        self._template = self._compiled(source)
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._markers = tuple(token.content for token in added if token.special)

    def encode(self, turns: Sequence[Mapping[str, str]], *, role: str, only_last: bool) -> tuple[list[int], list[bool]]:
        """The tokens of a conversation, and for each whether the role wrote it.

        only_last: the last turn alone is marked, whoever wrote it. Raises ValueError, with the reason, when the
        template refuses the turns, when it renders earlier turns differently once later ones are there, and when a turn
        spells a special token.
        """
        for turn in turns:
            spelt = next((marker for marker in self._markers if marker in turn["content"]), None)
            if spelt is not None:
                raise ValueError(f"a turn spells the special token {spelt}")
        spans = self._spans(turns, role, only_last)
        text = self._render(turns)
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        written = [any(start <= at < stop for start, stop in spans) for at, _ in encoded.offsets]
        return encoded.ids, written

    def _spans(self, turns: Sequence[Mapping[str, str]], role: str, only_last: bool) -> list[tuple[int, int]]:
        """Where the marked turns lie in the rendered text [characters]."""
        whole = self._render(turns)
        spans = []
        for number, turn in enumerate(turns):
            last = number == len(turns) - 1
            if turn["role"] != role if not only_last else not last:
                continue
            opened = self._render(turns[:number], opened=turn["role"] == role) if number else ""
            closed = whole if last else self._render(turns[: number + 1])
            if not whole.startswith(opened) or not whole.startswith(closed) or len(closed) < len(opened):
                raise ValueError("the template renders earlier turns differently once later ones are there")
            spans.append((len(opened), len(closed)))
        return spans

    def _render(self, turns: Sequence[Mapping[str, str]], *, opened: bool = False) -> str:
        known = {name: token for name, token in self._special.items() if token is not None}
        try:
            return self._template.render(messages=list(turns), add_generation_prompt=opened, **known)
        except jinja2.TemplateError as fault:
            raise ValueError(str(fault)) from fault

    def _compiled(self, source: str) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refused_by_template
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        try:
            return environment.from_string(source)
        except jinja2.TemplateError as fault:
            self._refuse(f"the chat template cannot be read ({fault})")

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError.of(
            what, key="tokenizer_path", value=self._folder, remedy="give the tokenizer folder of a chat model"
        )

    def __getstate__(self) -> str:
        return self._folder

    def __setstate__(self, folder: str) -> None:
        self.__init__(folder)  # type: ignore[misc]


def _refused_by_template(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _token(told: Any) -> str | None:
    told = told.get("content") if isinstance(told, dict) else told
    return told if isinstance(told, str) else None


def _text(path: Path, folder: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        remedy = "give the tokenizer folder of a chat model, with tokenizer.json and tokenizer_config.json"
        what = f"cannot read {path.name} ({fault})"
        raise ConfigError.of(what, key="tokenizer_path", value=folder, remedy=remedy) from fault


def _json(path: Path, folder: str) -> dict[str, Any]:
    try:
        found = json.loads(_text(path, folder))
    except ValueError as fault:
        what = f"{path.name} is not JSON ({fault})"
        raise ConfigError.of(what, key="tokenizer_path", value=folder) from fault
    return found if isinstance(found, dict) else {}
