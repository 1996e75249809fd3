"""Chat templates: the text that transformers makes of a conversation, where templates are found, and refusals."""

import json
from datetime import datetime

import pytest

from megatron.errors import ConfigError
from megatron.tokenizers.chat_template import ChatTemplate, TemplateRefusal
from tests.tokenizers import made

ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" + ASK
TURNS = [
    {"role": "system", "content": "Be kind & <brief>."},
    {"role": "user", "content": " What is it? "},
    {"role": "assistant", "content": "A test.", "reasoning_content": "why not"},
    {"role": "user", "content": "Ünd 東京?"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says <it> & 東京",
        "parameters": {"type": "object", "z": [1], "a": 2},
    },
}
DOCUMENT = {"title": "One", "text": "Some words."}
CALL = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "weather", "arguments": {"b": 1, "a": "é"}}}],
    },
    {"role": "tool", "content": "no", "name": "weather"},
]
# Each uses something that templates of today use. The words are this file's own.
TEMPLATES = {
    "plain": PLAIN,
    "whitespace": """
    {%- for m in messages %}
        {%- if m.role == 'system' %}
            {{- '<<' + m.content | trim + '>>' }}
            {%- continue %}
        {%- endif %}
[{{ m.role | upper }}] {{ m['content'] | trim }}
    {% endfor %}
    {% if add_generation_prompt %}
[ASSISTANT]
    {%- endif %}
""",
    "break": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}" + ASK
    ),
    "generation in dashes": (
        "{% for m in messages %}\n  {%- if m.role == 'assistant' %}\n    {%- generation -%}\n  {{ m.content }} "
        "{{ loop.index }}\n    {%- endgeneration -%}\n  {%- else %}{{ m.content }}\n  {% endif %}\n{% endfor %}"
    ),
    "generation keeps its variables": (
        "{% set x = 'out' %}{% generation %}{% set x = 'in' %}{{ x }}{% endgeneration %}{{ x }}"
        "{% generation %}{% set y = 1 %}{% endgeneration %}{{ y is defined }}"
    ),
    "date": "{{ strftime_now('%Y-%m-%d') }} " + PLAIN,
    "guarded date": "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}26 Jul 2024{% endif %}" + PLAIN,
    "tojson": (
        "{% for t in tools or [] %}{{ t | tojson }}|{{ t | tojson(indent=2) }}|{{ t.function | tojson(True) }}|"
        "{{ t | tojson(separators=(',', ':'), sort_keys=True) }}{% endfor %}{{ messages[0] | tojson }}" + ASK
    ),
    "tools and documents": (
        "{%- if tools is not none %}TOOLS {{ tools | length }}{{ tools[0].function.name }}\n{% endif %}"
        "{% for d in documents or [] %}({{ d.title }}) {{ d['text'] }}\n{% endfor %}"
        "{% for m in messages %}{% if m.tool_calls is defined %}{% for c in m.tool_calls %}"
        "<call>{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</call>{% endfor %}"
        "{% elif 'content' in m %}{{ m.role }}={{ m.content }}{% endif %};{% endfor %}" + ASK
    ),
    "thinking": (
        "{% set ns = namespace(last=-1) %}{% for m in messages[::-1] %}{% if m.role == 'user' and ns.last < 0 %}"
        "{% set ns.last = messages | length - 1 - loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' and m.reasoning_content and loop.index0 < ns.last %}"
        "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.role }}:{{ m.get('content') }}\n{% endfor %}"
        "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    ),
    "macro": (
        "{% macro say(m, deep=false) %}{{ m.role }}{{ '!' if deep }}: {{ (m.content or '') | trim }}{% endmacro %}"
        "{% for m in messages if m.role != 'system' %}{{ say(m, deep=loop.last) }}\n{% endfor %}"
    ),
    "special tokens": (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{{ pad_token }}|"
        "{{ unk_token }}|{{ cls_token is defined }}"
    ),
    "own variables": (
        "{{ style | default('none') }}{{ eos_token }}{% for k, v in (more or {}).items() %}{{ k }}{{ v }}{% endfor %}"
    ),
    "text tests": (
        "{% for m in messages %}{% if m.content is string and m.content is not mapping %}{{ m.content.split('?')[0] }}"
        "{{ m.content.startswith('A') }}{{ m.content | length }}{{ m.content.lstrip() | replace('t', 'T') }}{% endif %}"
        "{{ raise_exception('never') if m.role == 'nobody' else '' }}{% endfor %}{{ dict(a=1)['a'] }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ range(3) | list }}"
        "{{ messages | map(attribute='role') | join(',') }}"
    ),
}
CALLS = {
    "answer": (TURNS, {"add_generation_prompt": True}),
    "whole": (TURNS, {}),
    "tools": (CALL, {"tools": [TOOL], "documents": [DOCUMENT], "add_generation_prompt": True}),
    "own": (TURNS, {"enable_thinking": False, "style": "calm", "eos_token": "<end>", "more": {"é": 1}}),
}


def folder_with(folder, template, **more):
    """A tokenizer folder of today's kind with this template."""
    made.chatml(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template")
    path.write_text(json.dumps(config | ({"chat_template": template} if template is not None else {}) | more))
    return folder


def theirs(folder, messages, **arguments):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False, **arguments)


@pytest.fixture(scope="module")
def tokenizer_of_transformers(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder_with(tmp_path_factory.mktemp("t"), PLAIN))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_text_is_that_of_transformers(tokenizer_of_transformers, template, call):
    messages, arguments = CALLS[call]
    source = TEMPLATES[template]
    tokens = tokenizer_of_transformers.special_tokens_map
    expected = tokenizer_of_transformers.apply_chat_template(
        messages, chat_template=source, tokenize=False, **arguments
    )
    assert ChatTemplate(source, tokens).render(messages, **arguments) == expected


def test_the_date_is_that_of_now():
    assert ChatTemplate(TEMPLATES["guarded date"]).render(TURNS).startswith(f"{datetime.now():%Y}<|im_start|>")  # noqa: DTZ005


@pytest.mark.parametrize("where", ["config", "file", "list", "folder", "list beside a file"])
def test_a_template_is_found_where_transformers_finds_it(tmp_path, where):
    """Each place holds another text, and files go before the configuration."""
    other = PLAIN.replace("<|im_end|>", "<|end|>")
    tools = "TOOLS" + PLAIN
    listed = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": tools}]
    folder = folder_with(tmp_path, {"config": PLAIN, "file": other, "folder": None}.get(where, listed))
    if where in ("file", "folder", "list beside a file"):
        (folder / "chat_template.jinja").write_text(PLAIN)
    if where == "folder":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(tools)
    for messages, arguments in CALLS.values():
        expected = theirs(folder, messages, **arguments)
        for found in (
            ChatTemplate.of_folder(folder),
            ChatTemplate.of_tokenizer("PretrainedFromHF", str(folder)),
            ChatTemplate.of_tokenizer("HFTokenizer", str(folder / "tokenizer.json")),
        ):
            assert found.render(messages, **arguments) == expected


def test_named_templates_without_a_default_are_reported_by_name(tmp_path):
    folder = folder_with(tmp_path, [{"name": "tool_use", "template": PLAIN}, {"name": "rag", "template": PLAIN}])
    found = ChatTemplate.of_folder(folder)
    assert found.render(CALL, tools=[TOOL]) == theirs(folder, CALL, tools=[TOOL])
    with pytest.raises(ConfigError, match=r"rag, tool_use.*none of them is the default"):
        found.render(TURNS)
    with pytest.raises(ValueError, match="no default specified"):
        theirs(folder, TURNS)


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": None},
        {"eos_token": {"__type": "AddedToken", "content": "</s>"}},
        {"bos_token": "<unk>", "eos_token": "<x>"},
        {},
    ],
)
@pytest.mark.parametrize("kind", ["GPT2TokenizerFast", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_special_tokens_are_those_of_the_file_and_of_its_class(tmp_path, config, kind):
    folder = made.llama2(tmp_path) if kind.startswith("Llama") else made.chatml(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **config}))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}|{{ eos_token }}|")
    assert ChatTemplate.of_folder(folder).render(TURNS) == theirs(folder, TURNS)


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("content", ["The answer is", "The answer is ", " It"])
def test_a_last_message_that_is_gone_on_with(tmp_path, trimmed, content):
    source = PLAIN.replace("m['content']", "m['content'] | trim") if trimmed else PLAIN
    messages = [*TURNS, {"role": "assistant", "content": content}]
    expected = theirs(folder_with(tmp_path, source), messages, continue_final_message=True)
    assert ChatTemplate(source).render(messages, continue_final_message=True) == expected


THINKING = (
    "{%- for m in messages %}{%- set c = m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else"
    " m.content %}<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("content", "accepted"),
    [
        ("<think>\nlong thought\n</think>\n\nThe answer is", False),
        ("<think></think>x", False),
        ("</think>", False),
        ("The answer is", True),
        (" <think>only open", True),
        ("", True),
    ],
)
def test_a_template_that_strips_reasoning_does_not_drop_it_from_what_is_gone_on_with(tmp_path, content, accepted):
    """As transformers does; the same words in an earlier message do not stand for those of the last one."""
    messages = [*TURNS, {"role": "assistant", "content": content}]
    folder = folder_with(tmp_path, THINKING)
    if accepted:
        expected = theirs(folder, messages, continue_final_message=True)
        assert ChatTemplate(THINKING).render(messages, continue_final_message=True) == expected
        return
    with pytest.raises(ValueError, match="final message does not appear"):
        theirs(folder, messages, continue_final_message=True)
    for before in ("hi", content):
        with pytest.raises(TemplateRefusal, match="leaves out a part of the last message"):
            ChatTemplate(THINKING).render(
                [{"role": "user", "content": before}, messages[-1]], continue_final_message=True
            )


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content }} ({{ m.content | length }}) {{ m.content }}",
        "{{ m.content | trim }}|{{ m.content | trim }}",
        "<!-- {{ m.content }} -->{{ m.content | trim }}",
    ],
)
@pytest.mark.parametrize("content", ["The answer is", "The answer is ", "", "x"])
def test_a_template_that_writes_a_message_twice_is_gone_on_with_at_the_last(body, content):
    source = f"{{%- for m in messages %}}{{{{ m.role }}}}:{body}<end>\n{{% endfor %}}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]
    template = ChatTemplate(source)
    text = template.render(messages, continue_final_message=True)
    assert text == template.render(messages).removesuffix("<end>\n")
    assert "\ufdd2" not in text


@pytest.mark.parametrize(
    ("template", "messages", "reported"),
    [
        ("{{ raise_exception('roles must alternate') }}", TURNS, "roles must alternate"),
        ("{{ messages[0].none.more }}", TURNS, "has no attribute"),
        ("{{ messages[9].role }}", TURNS, "undefined|no element"),
        ("{{ messages.__class__.__mro__ }}", TURNS, "unsafe"),
        ("{{ ''.join([].append.__self__) }}", TURNS, "unsafe"),
        ("{% set ns = namespace(__class__=1) %}", TURNS, "begins with an underscore"),
        ("{% set ns = namespace() %}{% set ns._a = 1 %}", TURNS, "begins with an underscore"),
        ("{{ messages.append(1) }}", TURNS, "unsafe"),
        ("{{ messages | tojson + 1 }}", TURNS, "concatenate"),
        ("{{ 1 / 0 }}", TURNS, "ZeroDivisionError"),
        ("{{ {1: 2}[messages[0].content] + strftime_now() }}", TURNS, "argument|undefined"),
    ],
)
def test_what_a_template_refuses_or_must_not_do_is_reported(template, messages, reported):
    with pytest.raises(TemplateRefusal, match=reported):
        ChatTemplate(template).render(messages)


def test_no_template_and_a_broken_one_are_the_users_issue(tmp_path):
    with pytest.raises(ConfigError, match="no chat template") as caught:
        ChatTemplate.of_folder(folder_with(tmp_path / "none", None), key="eval_chat_template")
    assert caught.value.issues[0].key == "eval_chat_template"
    with pytest.raises(ConfigError, match="no chat template"):
        ChatTemplate.of_tokenizer("CharLevelTokenizer", None)
    with pytest.raises(ConfigError, match="cannot be read"):
        ChatTemplate("{% for %}")
    (tmp_path / "none" / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        ChatTemplate.of_folder(tmp_path / "none")


def test_a_public_model_without_network_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(ConfigError, match="no public model"):
        ChatTemplate.of_tokenizer("PretrainedFromHF", "someone/model")


def test_a_public_models_template_is_fetched(tmp_path, monkeypatch):
    folder = folder_with(tmp_path, None)
    (folder / "chat_template.jinja").write_text(PLAIN)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(folder / file))
    found = ChatTemplate.of_tokenizer("PretrainedFromHF", "someone/model")
    assert found.render(TURNS) == theirs(folder, TURNS)


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name.startswith("generation")])
def test_what_generation_tags_enclose(template):
    source = TEMPLATES[template]
    text, spans = ChatTemplate(source).render_marked(TURNS)
    assert text == ChatTemplate(source).render(TURNS)
    enclosed = [text[start:stop] for start, stop in spans]
    assert (
        enclosed
        == {
            "generation": ["A test.<|im_end|>\n"],
            "generation in dashes": ["A test. 3"],
            "generation keeps its variables": ["in", ""],
        }[template]
    )
    assert ChatTemplate(source).marks_generation()
    assert not ChatTemplate("{# {% generation %} #}" + PLAIN).marks_generation()


def test_generation_tags_whose_text_is_changed_are_refused():
    changed = "{% set x %}{% generation %} a {% endgeneration %}{% endset %}{{ x | trim }}"
    assert ChatTemplate(changed).render(TURNS) == "a"
    with pytest.raises(TemplateRefusal, match="changes what its generation tags enclose"):
        ChatTemplate(changed).render_marked(TURNS)
