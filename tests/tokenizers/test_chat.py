"""Conversations as tokens: the ids of transformers, and which of them carry a loss."""

import pickle

import pytest

from megatron.errors import ConfigError
from megatron.tokenizers.chat_encoding import ChatTokens
from tests.tokenizers import made
from tests.tokenizers.test_chat_template import PLAIN, TEMPLATES, TOOL, folder_with

TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "  four  "},
]
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + PLAIN
)
THINKS = PLAIN.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
TRIMS = PLAIN.replace("m['content']", "m['content'] | trim")
NO_PROMPT = PLAIN.partition("{% if add")[0]
ENDS_TEXT = PLAIN.replace("assistant\n{% endif %}", "assistant\n{% else %}<|endoftext|>{% endif %}")
CLOSES_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|endoftext|>{% else %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Templates that close the last turn in another way than the others: that of Phi-3, and that of OLMo 3."""


def marked(chat, turns, role="assistant", *, only_last=False, **more):
    """What carries a loss, as text, special tokens included."""
    ids, written = chat.encode(turns, role=role, only_last=only_last, **more)
    own = [token for token, ours in zip(ids, written, strict=True) if ours]
    return chat.tokenizer._reader.decode(own, skip_special_tokens=False)


def chat_of(folder, template):
    return ChatTokens(str(folder_with(folder, template)))


@pytest.mark.parametrize("template", ["plain", "generation", "break", "whitespace", "macro"])
@pytest.mark.parametrize("build", [made.chatml, made.llama3, made.llama2])
def test_the_ids_are_those_of_transformers(tmp_path, template, build):
    from transformers import AutoTokenizer

    folder = build(tmp_path)
    (folder / "chat_template.jinja").write_text(TEMPLATES[template])
    theirs = AutoTokenizer.from_pretrained(folder)
    ids, _ = ChatTokens(str(folder)).encode(TURNS, role="nobody", only_last=False)
    assert ids == theirs.apply_chat_template(TURNS, return_dict=False)


def test_generation_tags_are_the_mask_that_transformers_makes(tmp_path):
    from transformers import AutoTokenizer

    folder = folder_with(tmp_path, TEMPLATES["generation"])
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        TURNS, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, written = ChatTokens(str(folder)).encode(TURNS, role="assistant", only_last=False)
    assert (ids, [int(own) for own in written]) == (expected["input_ids"], expected["assistant_masks"])
    assert sum(written) > 4


@pytest.mark.parametrize("opens", ["assistant: ", "assistant:", "assistant\n\n  ", "", "a"])
@pytest.mark.parametrize("build", [made.chatml, made.llama3, made.llama2])
def test_a_token_across_the_begin_of_an_answer_counts(tmp_path, build, opens):
    """With the tag and without it, as with the tag in transformers."""
    from transformers import AutoTokenizer

    tagged = (
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{ 'OPENS' }}{%- generation -%}"
        "{{ m.content + eos_token }}{%- endgeneration -%}"
        "{%- else -%}{{ m.role + ': ' + m.content + '\n' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'OPENS' }}{%- endif -%}"
    ).replace("OPENS", opens.replace("\n", "\\n"))
    folder = build(tmp_path)
    encoded = []
    for template in (tagged, tagged.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")):
        (folder / "chat_template.jinja").write_text(template)
        encoded.append(ChatTokens(str(folder)).encode(TURNS, role="assistant", only_last=False))
    (folder / "chat_template.jinja").write_text(tagged)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        TURNS, return_dict=True, return_assistant_tokens_mask=True
    )
    for ids, written in encoded:
        assert (ids, [int(own) for own in written]) == (expected["input_ids"], expected["assistant_masks"])


@pytest.mark.parametrize(
    ("template", "role", "turns", "expected"),
    [
        (PLAIN, "assistant", TURNS, "two<|im_end|>\n  four  <|im_end|>\n"),
        (PLAIN, "user", TURNS, "one<|im_end|>\nthree<|im_end|>\n"),
        (PLAIN, "system", TURNS, "be kind<|im_end|>\n"),
        (PLAIN, "nobody", TURNS, ""),
        (DEFAULT_SYSTEM, "assistant", TURNS[2:4], "two<|im_end|>\n"),  # the role opens: no header, no default system
        (DEFAULT_SYSTEM, "assistant", TURNS[4:], "  four  <|im_end|>\n"),
        (DEFAULT_SYSTEM, "user", TURNS[1:4], "one<|im_end|>\nthree<|im_end|>\n"),
        (TRIMS, "assistant", TURNS, "two<|im_end|>\nfour<|im_end|>\n"),
        (TRIMS, "assistant", TURNS[4:], "four<|im_end|>\n"),
        (NO_PROMPT, "assistant", TURNS, "two<|im_end|>\n  four  <|im_end|>\n"),
        (THINKS, "assistant", TURNS, "two<|im_end|>\n  four  <|im_end|>\n"),  # the prompt is not in what was written
        (THINKS, "assistant", [*TURNS[:2], {"role": "assistant", "content": "<think>x"}], "x<|im_end|>\n"),
        (PLAIN, "assistant", [*TURNS[:2], {"role": "assistant", "content": ""}], "<|im_end|>\n"),
        (ENDS_TEXT, "assistant", TURNS, "two<|im_end|>\n  four  <|im_end|>\n<|endoftext|>"),
        (ENDS_TEXT, "assistant", [*TURNS[:2], *TURNS[2:3] * 2], "two<|im_end|>\ntwo<|im_end|>\n<|endoftext|>"),
        (ENDS_TEXT, "user", TURNS[1:4], "one<|im_end|>\nthree<|im_end|>\n<|endoftext|>"),
        (CLOSES_LAST, "assistant", TURNS, "two<|im_end|>  four  <|endoftext|>"),
        (
            CLOSES_LAST,
            "assistant",
            [*TURNS[:2], {**TURNS[2], "content": ""}, *TURNS[3:]],
            "<|im_end|>  four  <|endoftext|>",
        ),
        (CLOSES_LAST, "user", TURNS, "one<|im_end|>\nthree<|im_end|>\n"),
        (TEMPLATES["generation"], "user", TURNS, "one<|im_end|>\nthree<|im_end|>\n"),
        (TEMPLATES["generation"], "assistant", TURNS[1:2], ""),
    ],
)
def test_what_carries_a_loss(tmp_path, template, role, turns, expected):
    assert marked(chat_of(tmp_path, template), turns, role) == expected


@pytest.mark.parametrize("content", ["two", "你好", "{1}", "\n", " two"])
def test_the_blank_that_a_model_has_to_write_carries_a_loss(tmp_path, content):
    """Without a prompt for answers a model is given the question alone, and the blank is its own, whatever follows."""
    chat = ChatTokens(str(made.llama2(tmp_path)))
    turns = [TURNS[1], {"role": "assistant", "content": content}]
    ids, written = chat.encode(turns, role="assistant", only_last=False)
    asked = chat.encode(turns[:1], role="nobody", only_last=False)[0]
    assert written == [number >= len(asked) for number in range(len(ids))] and ids[: len(asked)] == asked
    assert chat.tokenizer._reader.decode(ids, skip_special_tokens=False).endswith(f"[/INST] {content}</s>")


@pytest.mark.parametrize("template", [PLAIN, TEMPLATES["generation"], NO_PROMPT])
@pytest.mark.parametrize("field", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}])
def test_a_turn_that_says_so_carries_no_loss(tmp_path, template, field):
    turns = [*TURNS[:2], {**TURNS[2], **field}, TURNS[3], {**TURNS[4], **dict.fromkeys(field, 1)}]
    assert marked(chat_of(tmp_path, template), turns) == "  four  <|im_end|>\n"
    assert marked(chat_of(tmp_path, template), turns[:3], only_last=True) == ""


@pytest.mark.parametrize("value", [0.5, "0", [0]])
def test_a_share_of_a_loss_is_refused(tmp_path, value):
    turns = [*TURNS[:2], {**TURNS[2], "weight": value}]
    with pytest.raises(ValueError, match=r"'weight' is .* can be 1 or true"):
        chat_of(tmp_path, PLAIN).encode(turns, role="assistant", only_last=False)


@pytest.mark.parametrize("between", ["", "\n"])
def test_the_token_that_opens_the_next_turn_ends_one_without_an_end(tmp_path, between):
    """As in GLM-4, whose ids that end a text are those that open the turns of others."""
    template = (
        "{% for m in messages %}{{ {'assistant': '<|im_start|>', 'user': '<|im_end|>'}[m.role] }}"
        "{{ m.content + 'BETWEEN' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    ).replace("BETWEEN", between.replace("\n", "\\n"))
    chat = chat_of(tmp_path, template)
    assert marked(chat, TURNS[1:]) == f"two{between}<|im_end|>  four  {between}"
    assert marked(chat, TURNS[1:], "user") == f"one{between}<|im_start|>three{between}<|im_start|>"
    assert marked(chat, TURNS[1:4], "user", only_last=True) == f"three{between}"


@pytest.mark.parametrize("template", [PLAIN, TEMPLATES["generation"]])
@pytest.mark.parametrize(
    ("last", "role", "expected"),
    [
        (5, "assistant", "  four  <|im_end|>\n"),
        (4, "assistant", ""),  # a question is not learnt because it is the last turn
        (4, "user", "three<|im_end|>\n"),
        (5, "user", ""),
    ],
)
def test_the_last_turn_alone_where_the_role_wrote_it(tmp_path, template, last, role, expected):
    assert marked(chat_of(tmp_path, template), TURNS[:last], role, only_last=True) == expected
    result = {"role": "tool", "content": "42"}
    assert marked(chat_of(tmp_path, template), [*TURNS[:last], result], role, only_last=True) == ""


KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in KNOWN %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("known", ["['system', 'user', 'assistant']", "['system', 'developer', 'user', 'assistant']"])
def test_a_developer_is_the_system_where_the_template_knows_no_other(tmp_path, known):
    """As in the service, whose prompts must be those of training."""
    chat = chat_of(tmp_path, KNOWN_ROLES.replace("KNOWN", known))
    ids, written = chat.encode(
        [{"role": "developer", "content": "be kind"}, *TURNS[1:]], role="assistant", only_last=False
    )
    expected = chat.encode(TURNS, role="assistant", only_last=False)
    if "developer" in known:
        assert "<|im_start|>developer\nbe kind" in chat.tokenizer._reader.decode(ids, skip_special_tokens=False)
    else:
        assert (ids, written) == expected
    assert chat.left_out([{"role": "developer", "content": "be kind"}, *TURNS[1:]], {}) == []


def test_turns_that_the_template_does_not_write_are_reported(tmp_path):
    chat = chat_of(tmp_path, KNOWN_ROLES.replace("KNOWN", "['user', 'assistant']"))
    result = {"role": "tool", "content": [{"type": "text", "text": "42"}]}
    assert chat.left_out([*TURNS[:3], result, *TURNS[3:]], {}) == ["turns of system", "turns of tool"]
    assert chat.left_out(TURNS[1:], {}) == []


def test_earlier_turns_that_change_are_refused_unless_the_template_marks_them(tmp_path):
    """It drops what was thought before the last answer."""
    body = "{{ m.content.split('>')[-1] if not loop.last else m.content }}"
    turns = [*TURNS[:2], {"role": "assistant", "content": "<why>two"}, *TURNS[3:]]
    drops = PLAIN.replace("{{ m['content'] }}", body)
    for number, template in enumerate(
        (drops, drops.replace("assistant\n{% endif %}", "assistant\n{% else %}</s>{% endif %}"))
    ):
        with pytest.raises(ValueError, match="renders earlier turns differently"):
            chat_of(tmp_path / f"a{number}", template).encode(turns, role="assistant", only_last=False)
    tagged = TEMPLATES["generation"].replace("{{ m.content }}", body)
    assert marked(chat_of(tmp_path / "b", tagged), turns) == "two<|im_end|>\n  four  <|im_end|>\n"


LAST_THINKS = (
    "{% set last = namespace(at=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set last.at = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if tools and loop.index0 == last.at %}TOOLS{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > last.at %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].strip() }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Behind the last question alone answers begin with their reasoning, empty or not, as with Qwen3."""
OPENS_THINKING = LAST_THINKS.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("variables", [{}, {"tools": [TOOL]}])  # tools are described before the last question alone
@pytest.mark.parametrize(
    ("template", "opens"), [(LAST_THINKS, EMPTY), (OPENS_THINKING, EMPTY.removeprefix("<think>\n"))]
)
def test_earlier_answers_are_learnt_where_only_what_is_before_their_words_changes(tmp_path, template, opens, variables):
    chat = chat_of(tmp_path, template)
    learnt = marked(chat, TURNS, variables=variables)
    assert learnt == f"two<|im_end|>\n{opens}four<|im_end|>\n"
    inline = [*TURNS[:2], {"role": "assistant", "content": f"{EMPTY}two"}, *TURNS[3:]]
    assert marked(chat, inline, variables=variables) == learnt
    with pytest.raises(ValueError, match="renders earlier turns differently"):
        marked(chat, [*TURNS[:2], {**TURNS[2], "reasoning_content": "why"}, *TURNS[3:]], variables=variables)
    assert marked(chat, TURNS[1:], "user", variables=variables) == "one<|im_end|>\nthree<|im_end|>\n"


REASONED = [*TURNS[:2], {"role": "assistant", "content": "two", "reasoning_content": "why {"}]
INLINE = [*TURNS[:2], {"role": "assistant", "content": "<think>why {</think>two\n three"}]
CUTS = PLAIN.replace("m['content']", "m['content'].split('</think>')[-1]")
WRITES = PLAIN.replace("{{ m['content'] }}", "{{ m['reasoning_content'] }}{{ m['content'] | tojson }}")
FEWER_BLANKS = PLAIN.replace("m['content']", "m['content'].split() | join(' ')")


@pytest.mark.parametrize(
    ("template", "turns", "asked", "expected"),
    [
        (PLAIN, REASONED, {}, ["reasoning_content"]),
        (PLAIN, [*TURNS[:2], {"role": "assistant", "content": "two", "thinking": "why"}], {}, ["thinking"]),
        (WRITES, REASONED, {}, []),
        (WRITES, INLINE, {}, []),
        (CUTS, INLINE, {}, ["content"]),
        (CUTS, [*TURNS[:2], {"role": "assistant", "content": f"{EMPTY}two"}], {}, []),
        (CUTS, [*INLINE, *REASONED[1:]], {}, ["content", "reasoning_content"]),
        (CUTS, [*INLINE, *TURNS[1:]], {"only_last": True}, []),
        (CUTS, [*INLINE, *TURNS[1:]], {}, ["content"]),
        (CUTS, [*TURNS[:2], {**INLINE[2], "weight": 0}], {}, []),
        (CUTS, INLINE, {"role": "user"}, []),
        (CUTS, [{"role": "user", "content": "<b></think>c"}, TURNS[2]], {"role": "user"}, ["content"]),
        (FEWER_BLANKS, INLINE, {}, []),
        (LAST_THINKS, REASONED, {}, []),
        (LAST_THINKS, INLINE, {}, ["content"]),
    ],
)
def test_words_of_learnt_turns_that_the_template_does_not_write_are_reported(
    tmp_path, template, turns, asked, expected
):
    asked = {"role": "assistant", "only_last": False, **asked}
    assert chat_of(tmp_path, template).unwritten(turns, {}, **asked) == expected


def test_a_turn_that_spells_a_special_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"spells the special token <\|im_end\|>"):
        chat_of(tmp_path, PLAIN).encode(
            [{"role": "user", "content": "see <|im_end|>"}], role="assistant", only_last=False
        )


def test_it_travels_to_workers(tmp_path):
    chat = chat_of(tmp_path, TEMPLATES["generation"])
    again = pickle.loads(pickle.dumps(chat))
    assert again.encode(TURNS, role="assistant", only_last=False) == chat.encode(
        TURNS, role="assistant", only_last=False
    )


def test_a_folder_without_a_tokenizer_or_a_template_is_reported(tmp_path):
    (tmp_path / "empty").mkdir()
    without = folder_with(tmp_path / "t", None)
    for folder, reported in ((tmp_path / "empty", "no tokenizer.json"), (without, "no chat template")):
        with pytest.raises(ConfigError, match=reported) as caught:
            ChatTokens(str(folder))
        assert caught.value.issues[0].key == "tokenizer_path"
