"""Chat completions: what the model reads is what `transformers` makes of the messages, and what comes back."""

import copy
import json
import urllib.error
import urllib.request

import openai
import pytest
from openai.types.chat import ChatCompletionMessage
from transformers import AutoTokenizer

from megatron.serving.api_errors import Refused
from megatron.serving.chat_rendering import Conversations
from megatron.tokenizers.chat_template import ChatTemplate
from tests.evaluation.twins import LENGTH, twins
from tests.serving.service import running
from tests.tokenizers import made

TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}{% if who %}{{ who }}{% endif %}"
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}|{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
KINDS = {
    "llama2": made.llama2,
    "llama3": made.llama3,
    "chatml": made.chatml,
    "tools": lambda folder: made.chatml(folder, chat_template=TOOLS + made.CHATML),
    "parts": lambda folder: made.chatml(folder, chat_template=PARTS),
}
HI = [{"role": "user", "content": "Hi, is this a <|im_end|> test?"}]
MORE = [{"role": "system", "content": "Be é."}, *HI, {"role": "assistant", "content": " yes "}, *HI]
CONVERSATIONS = (HI, MORE)
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module", params=KINDS)
def served(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    both = twins(KINDS[request.param](folder), "PretrainedFromHF")
    read = []  # what the model is asked about
    engine = copy.copy(both.engine)
    plain = engine.logits

    def logits(tokens, cache=None, at=None):
        read.append(tokens.tolist())
        return plain(tokens, cache, at)

    engine.logits = logits
    chat = Conversations.of_tokenizer("PretrainedFromHF", str(folder))
    ends = tuple(both.tokenizer.encode_with_special_tokens("<|im_end|>"))
    with running(engine=engine, tokenizer=both.tokenizer, length=LENGTH, conversations=chat, end_ids=ends[:1]) as found:
        yield request.param, both, found, read


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served[2].url}/v1", api_key="none", max_retries=0) as each:
        yield each


def prompt_of(served, client, messages, **how):
    """The ids that the model reads of the messages."""
    read = served[3]
    read.clear()
    found = client.chat.completions.create(model="small", messages=messages, max_tokens=1, **how)
    assert found.usage.prompt_tokens == len(read[0][0])
    return read[0][0]


def test_the_model_reads_what_transformers_makes_of_the_messages(served, client):
    kind, both, *_ = served
    theirs = AutoTokenizer.from_pretrained(both.folder)
    for messages in CONVERSATIONS:
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt_of(served, client, messages) == expected
        closed = theirs.apply_chat_template(messages, add_generation_prompt=False, return_dict=False)
        assert prompt_of(served, client, messages, extra_body={"add_generation_prompt": False}) == closed
    begun = [*HI, {"role": "assistant", "content": "the answer is"}]
    expected = theirs.apply_chat_template(begun, continue_final_message=True, return_dict=False)
    assert prompt_of(served, client, begun, extra_body={"continue_final_message": True}) == expected
    parts = [{"role": "user", "content": [{"type": "text", "text": "a b"}, {"type": "text", "text": "c"}]}]
    given = parts if kind == "parts" else [{"role": "user", "content": "a b\nc"}]
    expected = theirs.apply_chat_template(given, add_generation_prompt=True, return_dict=False)
    assert prompt_of(served, client, parts) == expected


def test_answers_are_taken_back_with_all_that_the_client_knows_of_them(served, client):
    """As its object, as its whole dictionary with fields that are null, and with lists that are empty."""
    plain = {"role": "assistant", "content": "yes"}
    answer = ChatCompletionMessage(**plain)
    assert answer.model_dump()["annotations"] is None  # a field that is no message's
    expected = prompt_of(served, client, [*HI, plain, *HI])
    for given in (
        answer,
        answer.model_dump(),
        {**plain, "tool_calls": [], "annotations": [], "what_others_say": None},
        {**plain, "cache_control": {"type": "ephemeral"}},
    ):
        assert prompt_of(served, client, [*HI, given, *HI]) == expected
    part = {"type": "text", "text": "yes"}
    hinted = {**plain, "content": [{**part, "cache_control": {"type": "ephemeral"}}]}
    expected = prompt_of(served, client, [*HI, {**plain, "content": [part]}, *HI])
    assert prompt_of(served, client, [*HI, hinted, *HI]) == expected
    for name, value in {"annotations": [{}], "what_others_say": 1}.items():
        with pytest.raises(openai.BadRequestError, match=rf"messages\.1\.{name}: "):
            prompt_of(served, client, [*HI, {**plain, name: value}])


def test_tools_and_variables_reach_the_template_or_are_refused(served, client):
    kind, both, *_ = served
    if kind != "tools":
        with pytest.raises(openai.BadRequestError, match="no place for them"):
            prompt_of(served, client, HI, tools=[TOOL])
        assert prompt_of(served, client, HI, tools=[TOOL], tool_choice="none") == prompt_of(served, client, HI)
        return
    theirs = AutoTokenizer.from_pretrained(both.folder)
    expected = theirs.apply_chat_template(HI, tools=[TOOL], add_generation_prompt=True, return_dict=False)
    assert prompt_of(served, client, HI, tools=[TOOL]) == expected
    assert prompt_of(served, client, HI, tools=[TOOL], tool_choice="auto", parallel_tool_calls=True) == expected
    named = theirs.apply_chat_template(HI, who="me", add_generation_prompt=True, return_dict=False)
    assert prompt_of(served, client, HI, extra_body={"chat_template_kwargs": {"who": "me"}}) == named
    with pytest.raises(openai.BadRequestError, match="chat_template_kwargs: messages"):
        prompt_of(served, client, HI, extra_body={"chat_template_kwargs": {"messages": []}})


def test_an_answer_is_that_to_the_rendered_prompt(served, client):
    both = served[1]
    text = both.chat().render(HI, add_generation_prompt=True)
    ids = both.tokenizer.encode_with_special_tokens(text)
    plain = client.completions.create(model="small", prompt=ids, max_tokens=8, temperature=0, logprobs=2)
    found = client.chat.completions.create(
        model="small", messages=HI, max_completion_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    choice = found.choices[0]
    assert (found.object, choice.message.role, choice.message.refusal) == ("chat.completion", "assistant", None)
    assert choice.message.content == plain.choices[0].text and found.usage == plain.usage
    scores = plain.choices[0].logprobs
    assert [each.token for each in choice.logprobs.content] == scores.tokens
    assert [each.logprob for each in choice.logprobs.content] == scores.token_logprobs
    for each in choice.logprobs.content:
        assert len(each.top_logprobs) == 2 and each.top_logprobs[0].logprob >= each.logprob
        if not each.token.startswith(("bytes:", "token_id:")):
            assert bytes(each.bytes).decode() == each.token
    full = bytes(byte for each in choice.logprobs.content for byte in each.bytes)
    if not any(token in both.tokenizer.special_tokens for token in scores.tokens):
        assert full.decode(errors="replace").count("\ufffd") <= choice.message.content.count("\ufffd")


def test_an_answer_ends_at_special_tokens(served, client):
    """At an id of eos_token_ids, and at a stop text that is a special token or holds one."""
    both = served[1]
    for text, number in both.tokenizer.special_tokens.items():
        found = client.chat.completions.create(
            model="small", messages=HI, max_tokens=4, stop=text, logit_bias={str(number): 100}, temperature=0
        )
        assert (found.choices[0].finish_reason, found.choices[0].message.content) == ("stop", "")
        assert found.usage.completion_tokens == 0
    end = both.tokenizer.special_tokens.get("<|im_end|>")
    if end is not None:
        found = client.chat.completions.create(model="small", messages=HI, max_tokens=4, logit_bias={str(end): 100})
        assert found.choices[0].finish_reason == "stop"


def ask(url, body):
    request = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


ERRORS = {
    "both lengths": ({"max_tokens": 2, "max_completion_tokens": 3}, "differ"),
    "likeliest alone": ({"top_logprobs": 2}, "logprobs"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url"),
    "no role": ({"messages": [{"content": "a"}]}, "role"),
    "unknown field": ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "weight"),
    "both ends": ({"add_generation_prompt": True, "continue_final_message": True}, "exclude"),
    "surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    "surrogate in a variable": ({"chat_template_kwargs": {"a": ["\udfff"]}}, "surrogate"),
    "surrogate in a name": ({"chat_template_kwargs": {"\udfff": 1}}, "surrogate"),
    "arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "no JSON",
    ),
    "no one's own": ({"messages": [{"role": "judge", "content": "a"}]}, "roles must be"),
    "too long": ({"messages": [{"role": "user", "content": "a" * 99}]}, "context"),
    "half an option": ({"stream_options": {"include_usage": True}}, "stream"),
}


@pytest.fixture(scope="module")
def strict():
    template = (
        "{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('roles must be known') }}{% endif %}"
        "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.a }}{% endif %}{{ a }}{% endfor %}"
    )
    with running(conversations=Conversations(ChatTemplate(template))) as found:
        yield found


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_done_is_reported(strict, name):
    how, reported = ERRORS[name]
    status, answer = ask(strict.url, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **how})
    assert status == 400 and reported in answer["error"]["message"], answer
    assert "Value error" not in answer["error"]["message"]
    assert answer["error"]["message"][0].isalpha(), answer


def test_a_part_of_a_last_message_is_not_dropped_where_the_template_strips_it():
    """`transformers` raises ValueError."""
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}|{% endfor %}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>a</think>b"}]
    with running(conversations=Conversations(ChatTemplate(template))) as served:
        body = {"messages": messages, "max_tokens": 1, "continue_final_message": True}
        status, answer = ask(served.url, body)
        assert status == 400 and "leaves out a part of the last message" in answer["error"]["message"], answer
        messages[-1]["content"] = "b"
        assert ask(served.url, body)[1]["usage"]["prompt_tokens"] == len("hi|b")


def test_arguments_of_calls_are_what_their_json_says(strict):
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "xyz"}'}}]
    body = {"messages": [{"role": "assistant", "content": "b", "tool_calls": calls}], "max_tokens": 1}
    assert ask(strict.url, body)[1]["usage"]["prompt_tokens"] == len("bxyz")


@pytest.mark.parametrize("given", [{}, {"arguments": None}, {"arguments": "null"}, {"arguments": "{}"}], ids=str)
def test_a_call_without_arguments_is_taken(given):
    source = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments | items %}"
    source += "{{ k }}{% endfor %}<{{ c.function.arguments | tojson }}>{% endfor %}{% endfor %}"
    with running(conversations=Conversations(ChatTemplate(source))) as served:
        calls = [{"id": "1", "type": "function", "function": {"name": "f", **given}}]
        status, answer = ask(served.url, {"messages": [{"role": "assistant", "tool_calls": calls}], "max_tokens": 1})
        assert status == 200 and answer["usage"]["prompt_tokens"] == len("<{}>"), answer


def test_arguments_of_calls_stay_a_text_for_a_template_that_joins_texts():
    source = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<' + ARGUMENTS + '>' }}"
    source = source.replace("ARGUMENTS", "c.function.arguments") + "{% endfor %}{% endfor %}"
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": calls}]
    assert Conversations(ChatTemplate(source)).text(turns) == 'ab<{"a":1}>'


ROLES = (
    "{% for m in messages %}{% if m.role == 'user' %}u{{ m.content }}{% elif m.role == 'assistant' %}a{{ m.content }}"
    "{% elif m.role == 'system' %}s{{ m.content }}ELSE{% endif %}{% endfor %}"
)
DEVELOPER = [{"role": "developer", "content": "1"}, {"role": "user", "content": "2"}]


@pytest.mark.parametrize(
    ("others", "text"),
    [
        ("", "s1u2"),  # it leaves other roles out
        ("{% else %}{{ raise_exception('Unexpected message role.') }}", "s1u2"),
        ("{% elif m.role == 'developer' %}d{{ m.content }}", "d1u2"),
        ("{% else %}<{{ m.role }}>{{ m.content }}", "<developer>1u2"),
    ],
)
def test_a_developer_is_received(others, text):
    """What it says must reach the model, under its own role where the template has that, else as the system's."""
    chat = Conversations(ChatTemplate(ROLES.replace("ELSE", others)))
    assert chat.text(DEVELOPER) == text
    parts = [{"role": "developer", "content": [{"type": "text", "text": "1"}]}, DEVELOPER[1]]
    assert chat.text(parts) == text


@pytest.mark.parametrize("role", ["judge", "tool", "function"])
def test_words_that_the_template_leaves_out_are_reported(role):
    chat = Conversations(ChatTemplate(ROLES.replace("ELSE", "")))
    with pytest.raises(Refused, match=rf"messages\.1\.role: .* leaves out what a {role} says"):
        chat.text([DEVELOPER[1], {"role": role, "content": "3"}])
    assert chat.text([DEVELOPER[1], {"role": "assistant", "content": "3"}]) == "u2a3"


def test_variables_that_are_none_of_the_templates_are_refused(strict):
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}
    status, answer = ask(strict.url, body)
    assert status == 400 and "chat_template is no variable" in answer["error"]["message"]


def test_without_a_template_the_answer_says_so():
    with running(conversations=Conversations.of_tokenizer("CharLevelTokenizer", None)) as found:
        status, answer = ask(found.url, {"messages": [{"role": "user", "content": "hi"}]})
    assert status == 400 and "takes no messages" in answer["error"]["message"]
    assert "no chat template" in answer["error"]["message"]
