"""A model's chat template: how the messages of a conversation become one text.

Training data, evaluation and the text service render with this. A template is code from a file, so it runs in jinja2's
sandbox, with what `transformers` gives it: loop controls, the tag `generation`, `raise_exception`, `strftime_now`,
`tojson`, the special tokens by name, `tools`, `documents` and whatever else is handed over. A folder may hold several
templates by name; `tool_use` is taken where tools are there, else `default`.

Sources: the Hugging Face tokenizer files `chat_template.jinja`, `additional_chat_templates/` and
`tokenizer_config.json`; https://huggingface.co/docs/transformers/chat_templating.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from megatron.errors import ConfigError
from megatron.tokenizers.pretrained import HFGPT2Tokenizer, PretrainedFromHF, files_of
from megatron.tokenizers.tokenizer_config import CONFIG, read_beside, token_text

TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
DEFAULT, WITH_TOOLS = "default", "tool_use"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Characters that no text holds mark what the tag `generation` encloses, and where a message is to be gone on with.
_OPENS, _CLOSES, _MARK = "\ufdd0", "\ufdd1", "\ufdd2"
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of the field of a message that holds reasoning; the first that is there counts."""
_HUB_KINDS = (PretrainedFromHF.__name__, HFGPT2Tokenizer.__name__)

Message = Mapping[str, Any]


class TemplateRefusal(ValueError):
    """The template cannot render these messages; the text says why."""


class ChatTemplate:
    """The templates of a tokenizer, with the special tokens that they may write.

    Raises ConfigError when the default one is no template.

    Args:
        templates: One template in jinja2's language, or several by name.
        tokens: `bos_token` and the like.
        key: Key that named the template, for messages.
        location: File it is from, for messages.
    """

    def __init__(
        self,
        templates: str | Mapping[str, str],
        tokens: Mapping[str, str] | None = None,
        *,
        key: str = "chat_template",
        location: str | None = None,
    ) -> None:
        self._sources = {DEFAULT: templates} if isinstance(templates, str) else dict(templates)
        self._tokens = dict(tokens or {})
        self._key, self._where = key, location
        self._compiled: dict[tuple[str, bool], jinja2.Template] = {}
        self._marking: dict[str, bool] = {}
        if DEFAULT in self._sources:
            self._template(DEFAULT)

    @classmethod
    def of_folder(cls, folder: str | Path, *, key: str = "chat_template") -> ChatTemplate:
        """The template of a folder of tokenizer files. Raises ConfigError when it has none."""
        path = Path(folder)
        more = sorted((path / MORE_TEMPLATES).glob("*.jinja"))
        return cls._of_files(path / TEMPLATE, more, path / CONFIG, key, str(folder))

    @classmethod
    def of_tokenizer(cls, tokenizer_type: str, vocab_file: str | None, *, key: str = "chat_template") -> ChatTemplate:
        """The template that goes with a run's tokenizer: of its folder, that of its file, or a public model's.

        Raises ConfigError when there is none.
        """
        path = Path(vocab_file) if vocab_file else None
        if path is not None and path.is_dir():
            return cls.of_folder(path, key=key)
        if tokenizer_type in _HUB_KINDS and not (path is not None and path.is_file()):
            name = vocab_file or "gpt2"
            files = files_of(name, (CONFIG, TEMPLATE))
            missing = Path(name)
            return cls._of_files(files.get(TEMPLATE, missing / TEMPLATE), (), files.get(CONFIG, missing), key, name)
        if path is None:
            _refuse("the tokenizer has no file, so there is no chat template beside it", key, None)
        return cls.of_folder(path.parent, key=key)

    @classmethod
    def _of_files(cls, file: Path, more: Sequence[Path], config: Path, key: str, location: str) -> ChatTemplate:
        settings = _read_settings(config, key, location)
        found = {DEFAULT: _read(file, key, location)} if file.is_file() else {}
        found |= {each.name.removesuffix(".jinja"): _read(each, key, location) for each in more}
        templates = found or _named_templates(settings.get("chat_template"))
        if not templates:
            _refuse(f"there is no chat template, neither {TEMPLATE} nor in {CONFIG}", key, location)
        return cls(templates, _tokens(config, settings), key=key, location=location)

    @property
    def source(self) -> str:
        """The default template, in jinja2's language. Raises ConfigError where there are only others."""
        return self._sources[self._name(None)]

    @property
    def digest(self) -> str:
        """A hash of all templates and special tokens, which names what is made with them."""
        content = json.dumps([self._sources, self._tokens], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def marks_generation(self, tools: object = None) -> bool:
        """Whether the template says, by the tag `generation`, what the model is to write. tools: as for render."""
        name = self._name(tools)
        if name not in self._marking:
            self._marking[name] = _Generation.used_by(self._sources[name])
        return self._marking[name]

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The text of a conversation.

        Raises TemplateRefusal where the template cannot render them.

        Args:
            messages: Each with a `role`, and what the template asks for.
            add_generation_prompt: End with what opens an answer.
            continue_final_message: End inside the last message, which is gone on with.
            tools: JSON schemas of the tools.
            documents: Documents that the template receives.
            **extra: Further variables of the template.
        """
        given = _plain(messages)
        variables = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt, **extra}
        if continue_final_message:
            return self._continued(given, variables)
        return self._rendered(self._name(tools), given, variables, marks=False)

    def _continued(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The text up to the end of the last message. Raises TemplateRefusal where not all of it is there."""
        name, message = self._name(variables["tools"]), _last_text(messages)
        marked = self._rendered(name, _to_be_continued(messages), variables, marks=False)
        before, after = _parted_at_the_mark(marked)
        if _MARK in before:  # the template writes the message more than once, or its length as well
            before = _without_end(self._rendered(name, messages, variables, marks=False), after)
        if not before.rstrip().endswith(message.strip()):
            raise TemplateRefusal(
                "the template changes or leaves out a part of the last message, such as its reasoning, so that it "
                "cannot be gone on with: leave that part out of the message, or let the model begin its own"
            )
        return before

    def render_marked(self, messages: Sequence[Message], **extra: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text, and which stretches the tag `generation` encloses [characters]. Raises TemplateRefusal."""
        text = self.render(messages, **extra)
        variables = {"tools": None, "documents": None, "add_generation_prompt": False, **extra}
        marked = self._rendered(self._name(extra.get("tools")), _plain(messages), variables, marks=True)
        spans, plain = _without_marks(marked)
        if plain != text:
            raise TemplateRefusal("the template changes what its generation tags enclose")
        return text, spans

    def _rendered(self, name: str, messages: list[dict[str, Any]], variables: dict[str, Any], *, marks: bool) -> str:
        try:
            return self._template(name, marks=marks).render(messages=messages, **{**self._tokens, **variables})
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise TemplateRefusal(str(error)) from error
        except (ArithmeticError, RecursionError) as error:
            raise TemplateRefusal(f"{type(error).__name__}: {error}") from error

    def _name(self, tools: object) -> str:
        if tools is not None and WITH_TOOLS in self._sources:
            return WITH_TOOLS
        if DEFAULT not in self._sources:
            message = (
                f"there are chat templates ({', '.join(sorted(self._sources))}), and none of them is the default one"
            )
            _refuse(message, self._key, self._where, f"save the right one as {TEMPLATE}")
        return DEFAULT

    def _template(self, name: str, *, marks: bool = False) -> jinja2.Template:
        if (name, marks) not in self._compiled:
            try:
                self._compiled[name, marks] = _environment(marks).from_string(self._sources[name])
            except jinja2.TemplateError as error:
                _refuse(f"the chat template cannot be read ({error})", self._key, self._where)
        return self._compiled[name, marks]


class _Generation(Extension):
    """The tag `generation`: what is inside is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  the library declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """The tag as a scope of its own, as a call block has one."""
        line = next(parser.stream).lineno
        body = self._marked(list(parser.parse_statements(("name:endgeneration",), drop_needle=True)))
        return nodes.Scope(body).set_lineno(line)

    def _marked(self, body: list[nodes.Node]) -> list[nodes.Node]:
        return body

    @staticmethod
    def used_by(source: str) -> bool:
        """Whether a template has the tag."""
        tokens = [(kind, text) for _, kind, text in _environment(False).lex(source) if kind != "whitespace"]
        return any(before[0] == "block_begin" and after == ("name", "generation") for before, after in pairwise(tokens))


class _MarkedGeneration(_Generation):
    """The same, between marks."""

    def _marked(self, body: list[nodes.Node]) -> list[nodes.Node]:
        opens, closes = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_OPENS, _CLOSES))
        return [opens, *body, closes]


class _Namespace(Namespace):
    """jinja2's namespace without names that begin with an underscore, which lead out of the sandbox."""

    def __init__(*arguments: Any, **values: Any) -> None:  # a template may call a value `self`
        self, *rest = arguments
        given = dict(*rest, **values)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace holds no name that begins with an underscore: {name}")


def _environment(marks: bool) -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_MarkedGeneration if marks else _Generation, loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raised
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # noqa: DTZ005  local time
    environment.globals["namespace"] = _Namespace
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raised(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as transformers hands them over: without empty fields, and reasoning under each of its names."""
    made = []
    for message in messages:
        known = {name: value for name, value in message.items() if value is not None}
        reasoning = next((known[name] for name in REASONING if name in known), None)
        if reasoning is not None:
            known = {"thinking": reasoning, **known, "reasoning_content": reasoning}
        made.append(known)
    return made


def _last_text(messages: list[dict[str, Any]]) -> str:
    if not messages or not isinstance(messages[-1].get("content"), str):
        raise TemplateRefusal("there is no last message with a text to go on with")
    return str(messages[-1]["content"])


def _to_be_continued(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with a mark and a blank behind the last text."""
    last = messages[-1]
    return [*messages[:-1], {**last, "content": f"{last['content']}{_MARK} "}]


def _parted_at_the_mark(text: str) -> tuple[str, str]:
    """The text before the mark and behind it; what is before is stripped where the template strips a message."""
    before, mark, after = text.rpartition(_MARK)
    if not mark:
        raise TemplateRefusal("the template leaves out the end of the last message, which cannot be gone on with")
    return (before, after[1:]) if after.startswith(" ") else (before.rstrip(), after)


def _without_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise TemplateRefusal("the template writes the last message in a way that cannot be gone on with")
    return text.removesuffix(end)


def _without_marks(marked: str) -> tuple[list[tuple[int, int]], str]:
    spans, pieces, at, start = [], [], 0, 0
    for piece in marked.replace(_OPENS, f"\0{_OPENS}").replace(_CLOSES, f"\0{_CLOSES}").split("\0"):
        mark, text = (piece[0], piece[1:]) if piece[:1] in (_OPENS, _CLOSES) else ("", piece)
        if mark == _OPENS:
            start = at
        elif mark == _CLOSES:
            spans.append((start, at))
        pieces.append(text)
        at += len(text)
    return spans, "".join(pieces)


def _named_templates(listing: Any) -> dict[str, str]:
    if isinstance(listing, str):
        return {DEFAULT: listing}
    if isinstance(listing, Mapping):
        return {str(name): source for name, source in listing.items() if isinstance(source, str)}
    listed = [each for each in listing or () if isinstance(each, Mapping)] if isinstance(listing, list) else []
    return {str(each.get("name")): each["template"] for each in listed if isinstance(each.get("template"), str)}


def _tokens(config: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by their names, with the defaults of the class that the file names."""
    beside = read_beside(config)
    found = {name: token_text(settings.get(name)) for name in _NAMED}
    found |= {"bos_token": beside.begin, "eos_token": beside.end}
    return {name: text for name, text in found.items() if text is not None}


def _read_settings(config: Path, key: str, location: str) -> Mapping[str, Any]:
    if not config.is_file():
        return {}
    try:
        found = json.loads(_read(config, key, location))
    except ValueError as error:
        _refuse(f"{config.name} is not JSON ({error})", key, location)
    return found if isinstance(found, Mapping) else {}


def _read(path: Path, key: str, location: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        _refuse(f"cannot read {path.name} ({error})", key, location)


def _refuse(what: str, key: str, location: str | None, hint: str | None = None) -> NoReturn:
    hint = hint or f"put the model's {TEMPLATE} beside its tokenizer.json"
    raise ConfigError.of(what, key=key, value=location, hint=hint)
