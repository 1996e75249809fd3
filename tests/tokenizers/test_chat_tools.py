"""Conversations with tools, parts and variables: the ids of transformers, and which of them carry a loss."""

import pytest

from megatron.tokenizers.chat_encoding import ChatTokens
from megatron.tokenizers.chat_messages import InvalidToolCall, Shapes
from megatron.tokenizers.chat_template import ChatTemplate
from tests.tokenizers.test_chat import marked
from tests.tokenizers.test_chat_template import ASK, DOCUMENT, PLAIN, TEMPLATES, TOOL, folder_with

SAY = "{{ '<|im_start|>' + m.role }}\n"
CALLS_OF = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ ARGUMENTS }}</call>{% endfor %}"
BODY = (
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}" + CALLS_OF + "<|im_end|>\n"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}\n{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}<|im_start|>user\n{% endif %}"
    "<answer>{{ m.content }}</answer>{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}" + SAY + BODY + "{% endif %}{% endfor %}{{ style | default('') }}" + ASK
)
TAGS = "{% elif m.role == 'assistant' %}" + SAY + "{% generation %}" + BODY + "{% endgeneration %}{% else %}" + SAY
JSON_CALLS = TOOLS.replace("ARGUMENTS", "c.function.arguments | tojson")
EITHER_CALLS = TOOLS.replace(
    "{{ ARGUMENTS }}",
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
)
TEXT_CALLS = TOOLS.replace("ARGUMENTS", "'' + c.function.arguments + ''")
WRITES_CALLS = TOOLS.replace("ARGUMENTS", "c.function.arguments")
TAGGED = TOOLS.replace("{% else %}" + SAY, TAGS).replace("ARGUMENTS", "c.function.arguments | tojson")
PARTS = (
    "{% for m in messages %}" + SAY + "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}" + ASK
)
PARTS_OF_USERS = PARTS.replace("{% if m.content is string %}", "{% if m.content is string or m.role != 'user' %}")
FIRST_PART = (
    "{% for m in messages %}"
    + SAY
    + ("{{ m.content if m.content is string else m.content[0].text }}<|im_end|>\n{% endfor %}" + ASK)
)


LEFT_OUT = "left out"


def call(arguments, **beside):
    function = {"name": "weather"} if arguments == LEFT_OUT else {"name": "weather", "arguments": arguments}
    return {"id": "123456789", "type": "function", "function": function, **beside}


def with_calls(arguments, **turn):
    return [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call(arguments), call({})], **turn},
        {"role": "tool", "content": "no", "name": "weather", "tool_call_id": "123456789"},
        {"role": "tool", "content": "yes", "name": "weather"},
        {"role": "assistant", "content": "Dry."},
    ]


def parts(*texts, role="user"):
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


MAPPING, AS_TEXT = {"b": 1, "a": ["é", None]}, '{"b":1,"a":["\\u00e9",null]}'
WITHOUT = [{name: value for name, value in turn.items() if value is not None} for turn in with_calls(MAPPING)]
TEXTS = with_calls(AS_TEXT)
TEXTS[1]["tool_calls"][1]["function"]["arguments"] = ""
# template, turns, variables, and the turns for transformers where they differ
SHAPES = {
    "calls": (JSON_CALLS, with_calls(MAPPING), {}, None),
    "no content": (JSON_CALLS, WITHOUT, {}, None),
    "tools": (JSON_CALLS, with_calls(MAPPING), {"tools": [TOOL, TOOL]}, None),
    "no tools": (JSON_CALLS, with_calls(MAPPING), {"tools": []}, None),
    "documents": (JSON_CALLS, with_calls(MAPPING), {"documents": [DOCUMENT], "style": "calm"}, None),
    "arguments as text": (JSON_CALLS, with_calls(AS_TEXT), {}, with_calls(MAPPING)),
    "arguments as text or not": (EITHER_CALLS, with_calls(AS_TEXT), {}, with_calls(MAPPING)),
    "arguments joined": (TEXT_CALLS, TEXTS, {}, None),
    **{
        f"no arguments: {given!r}": (JSON_CALLS, with_calls(given), {}, with_calls({}))
        for given in ("", " ", None, "null")
    },
    "no field of arguments": (JSON_CALLS, with_calls(LEFT_OUT), {}, with_calls({})),
    "reasoning": (JSON_CALLS, with_calls(MAPPING, thinking="why"), {}, None),
    "tags": (TAGGED, with_calls(MAPPING), {"tools": [TOOL]}, None),
    "parts": (PARTS, [parts("a", "b"), parts("c", role="assistant")], {}, None),
    "parts of system": (PARTS, [parts("s", "t", role="system"), parts("a"), parts("c", role="assistant")], {}, None),
    "no parts": (PLAIN, [parts("a", "b")], {}, [{"role": "user", "content": "a\nb"}]),
    "parts of users alone": (
        PARTS_OF_USERS,
        [parts("a", "b"), parts("c", "d", role="assistant")],
        {},
        [parts("a", "b"), {"role": "assistant", "content": "c\nd"}],
    ),
    "a template that reads one part": (FIRST_PART, [parts("a", "b")], {}, [{"role": "user", "content": "a\nb"}]),
    "variables": (TEMPLATES["own variables"], [parts("a")], {"style": "calm", "eos_token": "<|im_end|>"}, None),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ids_are_those_of_transformers(tmp_path, shape):
    from transformers import AutoTokenizer

    template, turns, variables, theirs = SHAPES[shape]
    folder = folder_with(tmp_path, template)
    ids, _ = ChatTokens(str(folder)).encode(turns, role="nobody", only_last=False, variables=variables)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        theirs or turns, return_dict=False, **variables
    )
    assert ids == expected


WRITTEN = '<call>weather {"b": 1, "a": ["é", null]}</call><call>weather {}</call><|im_end|>\nDry.<|im_end|>\n'
NO_PROMPT = JSON_CALLS.removesuffix(ASK)
EITHER_OR = NO_PROMPT.replace("{% if m.content %}", "{% if m.content and not m.tool_calls %}")


@pytest.mark.parametrize(
    ("template", "turns", "role", "expected"),
    [
        (JSON_CALLS, with_calls(MAPPING), "assistant", WRITTEN),
        (JSON_CALLS, with_calls(AS_TEXT), "assistant", WRITTEN),
        (JSON_CALLS, with_calls(MAPPING, content="Let me see. "), "assistant", "Let me see. " + WRITTEN),
        (JSON_CALLS, with_calls(MAPPING, thinking="why"), "assistant", "<think>why</think>" + WRITTEN),
        (NO_PROMPT, with_calls(MAPPING, thinking="why"), "assistant", "<think>why</think>" + WRITTEN),
        (EITHER_OR, with_calls(MAPPING), "assistant", WRITTEN),
        (EITHER_OR, with_calls(MAPPING)[1:2], "assistant", WRITTEN.removesuffix("Dry.<|im_end|>\n")),  # the role opens
        (TAGGED, with_calls(MAPPING), "assistant", WRITTEN),
        (JSON_CALLS, with_calls(MAPPING), "user", "Rain?<|im_end|>\n"),
        (JSON_CALLS, [*with_calls(MAPPING)[:2], with_calls(MAPPING)[3]], "tool", "yes</answer><|im_end|>\n"),
        (PARTS, [parts("a"), parts("b", "c", role="assistant")], "assistant", "bc<|im_end|>\n"),
        (PARTS.removesuffix(ASK), [parts("a"), parts("b", "c", role="assistant")], "assistant", "bc<|im_end|>\n"),
        (PLAIN, [parts("a"), parts("b", "c", role="assistant")], "assistant", "b\nc<|im_end|>\n"),
    ],
)
def test_what_the_role_wrote_carries_a_loss(tmp_path, template, turns, role, expected):
    chat = ChatTokens(str(folder_with(tmp_path, template)))
    assert marked(chat, turns, role, variables={"tools": [TOOL], "documents": [DOCUMENT]}) == expected


BEFORE_THE_LAST = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.index0 == messages | map(attribute='role') | "
    "list | length - 1 - (messages | map(attribute='role') | list | reverse | list).index('user') %}TOOLS{% endif %}"
    "[{{ m.content }}]{% elif m.role == 'tool' %}({{ m.content }}){% if not MET %}{{ raise_exception('no call') }}"
    "{% endif %}{% else %}" + BODY.replace("ARGUMENTS", "c.function.arguments | tojson") + "{% endif %}{% endfor %}"
).replace("MET", "messages | selectattr('tool_calls') | list")


def test_turns_count_where_tools_are_reported_of_before_the_last_question(tmp_path):
    """What is before the turns changes with every question, and the turns themselves do not."""
    from transformers import AutoTokenizer

    folder, turns = folder_with(tmp_path, BEFORE_THE_LAST), [*with_calls(MAPPING), *with_calls({})]
    chat = ChatTokens(str(folder))
    assert marked(chat, turns, variables={"tools": [TOOL]}) == WRITTEN + WRITTEN.replace(
        '{"b": 1, "a": ["é", null]}', "{}"
    )
    ids, _ = chat.encode(turns, role="assistant", only_last=False, variables={"tools": [TOOL]})
    text = chat.tokenizer._reader.decode(ids, skip_special_tokens=False)
    assert text.count("TOOLS") == 1 and text.index("TOOLS") > text.index("Dry.")
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, tools=[TOOL], return_dict=False)
    assert ids == theirs


def test_the_tags_of_the_template_for_tools_decide_where_tools_are(tmp_path):
    listed = [{"name": "default", "template": TAGGED}, {"name": "tool_use", "template": JSON_CALLS}]
    chat = ChatTokens(str(folder_with(tmp_path, listed)))
    assert marked(chat, with_calls(MAPPING), variables={"tools": [TOOL]}) == WRITTEN
    assert marked(chat, with_calls(MAPPING)) == WRITTEN


@pytest.mark.parametrize(("template", "retained"), [(TEXT_CALLS, True), (WRITES_CALLS, True), (JSON_CALLS, False)])
def test_arguments_stay_a_text_where_a_template_can_only_join_texts(template, retained):
    """Of a mapping the second would make Python's writing."""
    shapes = Shapes(ChatTemplate(template))
    assert shapes.keeps_arguments == retained
    given = shapes.given(with_calls(AS_TEXT))
    assert given[1]["tool_calls"][0]["function"]["arguments"] == (AS_TEXT if retained else MAPPING)
    flat = shapes.given([{"role": "assistant", "tool_calls": [{"name": "weather", "arguments": AS_TEXT}]}])
    assert flat[0]["tool_calls"][0]["arguments"] == (AS_TEXT if retained else MAPPING)


@pytest.mark.parametrize("given", [{}, {"arguments": None}, {"arguments": " null"}], ids=str)
@pytest.mark.parametrize(("template", "expected"), [(TEXT_CALLS, "{}"), (JSON_CALLS, {})])
def test_a_call_without_arguments_has_empty_ones(template, expected, given):
    calls = [{"type": "function", "function": {"name": "weather", **given}}, {"name": "weather", **given}]
    (turn,) = Shapes(ChatTemplate(template)).given([{"role": "assistant", "tool_calls": calls}])
    wrapped, flat = turn["tool_calls"]
    assert wrapped["function"]["arguments"] == flat["arguments"] == expected
    assert calls[0]["function"] == {"name": "weather", **given}
    other = {"type": "custom", "custom": {"name": "grep", "input": "a"}}
    assert Shapes(ChatTemplate(template)).given([{"role": "assistant", "tool_calls": [other]}])[0]["tool_calls"] == [
        other
    ]


def test_arguments_that_are_no_json_are_reported_with_their_turn():
    with pytest.raises(InvalidToolCall, match="turn 2: the arguments of weather are no JSON"):
        Shapes(ChatTemplate(JSON_CALLS)).given(with_calls("{"))


MARK = "<|im_end|>"


@pytest.mark.parametrize(
    ("turns", "variables"),
    [
        ([parts("a", f"see {MARK}")], {}),
        ([parts("<|im_", "end|>")], {}),  # a template that writes them one behind the other makes one of them
        (with_calls({"a": [{"b": MARK}]}), {}),
        (with_calls({MARK: 1}), {}),
        (with_calls('{"a": "\\u003c|im_end|>"}'), {}),
        (with_calls({}, thinking=MARK), {}),
        ([*with_calls({})[:2], {"role": "tool", "content": MARK}], {}),
        (with_calls({}), {"tools": [{"function": {"name": "f", "description": MARK}}]}),
        (with_calls({}), {"documents": [{"title": MARK}]}),
        (with_calls({}), {"style": MARK}),
    ],
)
def test_special_tokens_that_any_field_spells_are_refused(tmp_path, turns, variables):
    folder = str(folder_with(tmp_path, EITHER_CALLS if "tool_calls" in str(turns) else PARTS))
    with pytest.raises(ValueError, match=r"spells the special token <\|im_end\|>"):
        ChatTokens(folder).encode(turns, role="assistant", only_last=False, variables=variables)
    ChatTokens(folder, parse_special=True).encode(turns, role="nobody", only_last=False, variables=variables)


@pytest.mark.parametrize("name", ["messages", "chat_template", "add_generation_prompt", "tokenize"])
def test_what_is_no_variable_cannot_be_set(tmp_path, name):
    chat = ChatTokens(str(folder_with(tmp_path, PLAIN)))
    with pytest.raises(ValueError, match=f"'{name}' is no variable"):
        chat.encode([parts("a")], role="assistant", only_last=False, variables={name: True})


def test_what_the_template_has_no_position_for(tmp_path):
    variables = {"tools": [TOOL], "documents": [DOCUMENT]}
    plain = ChatTokens(str(folder_with(tmp_path / "plain", PLAIN)))
    assert plain.left_out(with_calls({}, content="b"), variables) == ["tools", "documents", "tool_calls"]
    assert plain.left_out([parts("a")], {"tools": []}) == []
    full = ChatTokens(str(folder_with(tmp_path / "tools", JSON_CALLS)))
    assert full.left_out(with_calls({}), variables) == []


PARTS_ALONE = (
    "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}{% if part is mapping %}{{ part['text'] }}"
    "{% endif %}{% endfor %}</{{ m['role'] }}>{% endfor %}"
)


def test_a_text_is_one_part_for_a_template_that_writes_parts_alone():
    """As templates of models that see images; of a text they would write nothing."""
    template = ChatTemplate(PARTS_ALONE)
    shapes = Shapes(template)
    assert shapes.writes("user") and shapes.writes("assistant")
    given = shapes.given([{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Dry."}])
    assert template.render(given) == "<user>Rain?</user><assistant>Dry.</assistant>"
    assert Shapes(ChatTemplate(JSON_CALLS)).given([{"role": "user", "content": "Rain?"}])[0]["content"] == "Rain?"
