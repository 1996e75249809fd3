"""The chat template that a tokenizer's folder carries: how turns of a conversation become one text.

The template is code from a file, so it runs in jinja2's sandbox. Sources: the Hugging Face tokenizer files
`chat_template.jinja` and `tokenizer_config.json` (keys chat_template, bos_token, eos_token), and the options that
transformers renders them with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError


class ChatTemplate:
    """A template with the special tokens that it may write.

    source: in jinja2's language. tokens: `bos_token` and the like. Raises ConfigError when the source is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.source = source
        self._tokens = dict(tokens)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError.of(f"the chat template cannot be read: {error}", key="eval_chat_template") from error

    @classmethod
    def beside(cls, vocab_file: str | None) -> ChatTemplate:
        """The template of the folder that the tokenizer's file lies in. Raises ConfigError when it has none."""
        folder = Path(vocab_file).parent if vocab_file else Path()
        config: dict[str, Any] = {}
        if (folder / "tokenizer_config.json").is_file():
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
        if not vocab_file or not isinstance(source, str):
            raise ConfigError.of(
                "the tokenizer's folder has no chat template",
                key="eval_chat_template",
                value=True,
                where=str(folder),
                remedy="put a chat_template.jinja, or a tokenizer_config.json with one, beside the vocab_file",
            )
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        return cls(source, {name: _text(config.get(name)) for name in names if config.get(name)})

    def render(self, turns: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation: turns with `role` and `content`."""
        return self._template.render(messages=list(turns), add_generation_prompt=add_generation_prompt, **self._tokens)


def _text(token: Any) -> str:
    """A special token, which stands as its text or as an object that holds it."""
    return str(token["content"]) if isinstance(token, Mapping) else str(token)


def _refuse(message: str) -> None:
    raise ConfigError.of(f"the chat template refuses the conversation: {message}", key="eval_chat_template")
