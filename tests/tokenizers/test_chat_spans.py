"""Where the answers are in what templates render that do something else at the end of a conversation."""

import pytest

from megatron.tokenizers.chat_spans import Rendering
from megatron.tokenizers.chat_template import ChatTemplate
from tests.tokenizers.test_chat import CLOSES_LAST, ENDS_TEXT, NO_PROMPT, TURNS
from tests.tokenizers.test_chat_template import PLAIN, TEMPLATES

HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA3 = (
    "{% for m in messages %}{{ '<s>' if loop.first }}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}" + HEADER + "{{ '' }}"
)
"""That of Llama 3 Instruct as first released."""
OPENS = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
R7B = (
    "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># Preamble<|END_OF_TURN_TOKEN|>\n{%- for m in messages %}"
    "<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|>{% if m.tool_calls %}<|START_ACTION|>"
    "{{ m.tool_calls | tojson }}<|END_ACTION|>{% else %}<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% endif %}"
    "{% else %}<|USER_TOKEN|>{{ m.content }}{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}" + OPENS
)
"""That of Command R7B with tools."""
ROLES = (
    "<|system|>be kind<|end|>{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<|say|>"
    "{{ m.content }}<|said|>{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}<|assistant|>"
)
"""Each role is a token of its own that opens a turn."""
BARE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
HASHES = (
    "Write.\n\n{% for m in messages %}### {{ m.role }}:\n{{ m.content }}{{ END }}\n\n{% endfor %}"
    "### assistant:\n{{ '' }}"
)
NEMOTRON = (
    "{% set last = messages[-1] %}{% for m in messages %}{% if not loop.last or m.role != 'assistant' %}"
    "<|say|>{{ m.role }}\n{{ m.content }}{{ '\n<|end|>\n' if m.role == 'assistant' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|say|>assistant\n<think>\n\n"
    "{% elif last.role == 'assistant' and last.content %}<|say|>assistant\n<think>\n\n{{ last.content }}\n<|end|>\n"
    "{% endif %}"
)
"""That of Nemotron Nano 2: an empty last answer is not written at all."""
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""That of gpt-oss."""
ASKED = (
    "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    "{{ raise_exception('No user query found in messages.') }}{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""That of Qwen3.5: a conversation has a question."""
SPECIAL = (
    *("<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|START_OF_TURN_TOKEN|>", "<|say|>"),
    *("<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>"),
    *("<|END_RESPONSE|>", "<|START_ACTION|>", "<|END_ACTION|>", "<|system|>", "<|user|>", "<|assistant|>", "<|said|>"),
    *("<|end|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|im_start|>", "<|im_end|>"),
)
ASK, HI, SO = TURNS[1], {"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "So"}
EMPTY, CALL = {"role": "assistant", "content": ""}, {"role": "assistant", "tool_calls": [1]}
SAID, FINAL = "<|START_RESPONSE|>{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<|channel|>final<|message|>"
TALK = [ASK, HI, ASK, SO]


def learnt(template, turns, role="assistant", special=SPECIAL):
    text, spans = Rendering(ChatTemplate(template), turns, {}, special).marked(role, False)
    assert text == ChatTemplate(template).render(turns)
    return [text[start:stop] for start, stop in spans]


@pytest.mark.parametrize(
    ("template", "turns", "role", "expected"),
    [
        (LLAMA3, TALK, "assistant", ["Hi<|eot_id|>", "So<|eot_id|>"]),
        (LLAMA3, TALK, "user", ["one<|eot_id|>"] * 2),
        (LLAMA3, TALK[:3], "assistant", ["Hi<|eot_id|>"]),
        (LLAMA3, TALK[:3], "user", ["one<|eot_id|>"] * 2),
        (LLAMA3, [TURNS[0], ASK, EMPTY, ASK, EMPTY], "assistant", ["<|eot_id|>"] * 2),
        (LLAMA3, [ASK, {**HI, "content": "one"}, ASK], "assistant", ["one<|eot_id|>"]),  # as the question
        (LLAMA3, [HI], "assistant", ["Hi<|eot_id|>"]),
        (R7B, TALK, "assistant", [SAID.format(each) for each in ("Hi", "So")]),
        (R7B, TALK, "user", ["one<|END_OF_TURN_TOKEN|>"] * 2),
        (R7B, [ASK, CALL], "assistant", ["<|START_ACTION|>[1]<|END_ACTION|><|END_OF_TURN_TOKEN|>"]),
        (ROLES, TALK, "assistant", ["<|say|>Hi<|said|><|end|>", "<|say|>So<|said|><|end|>"]),
        (BARE, TALK, "assistant", ["Hi<|user|>", "So"]),
        (HASHES.replace("END", "'</s>'"), TALK, "assistant", ["Hi</s>\n\n", "So</s>\n\n"]),
        (HASHES.replace("END", "''"), TALK, "assistant", ["Hi\n\n", "So\n\n"]),
        (NEMOTRON, [ASK, EMPTY, ASK, SO], "assistant", ["\n<|end|>\n", "So\n<|end|>\n"]),
        (NEMOTRON, [ASK, HI, ASK, EMPTY], "assistant", ["Hi\n<|end|>\n", ""]),
        (HARMONY, [ASK, EMPTY, ASK, SO], "assistant", [f"{FINAL}<|end|>", f"{FINAL}So<|return|>"]),
        (HARMONY, [ASK, EMPTY], "assistant", [f"{FINAL}<|return|>"]),
        (ASKED, [HI, *TALK], "assistant", [f"{each}<|im_end|>\n" for each in ("Hi", "Hi", "So")]),
        (ASKED, [TURNS[0], EMPTY, ASK, SO], "assistant", ["<|im_end|>\n", "So<|im_end|>\n"]),
        (ASKED, [TURNS[0], HI, ASK, SO], "system", ["be kind<|im_end|>\n"]),
        (HARMONY, [ASK, EMPTY, ASK, SO], "user", ["one<|end|>"] * 2),
    ],
)
def test_the_words_and_the_end_of_a_turn_are_learnt_alone(template, turns, role, expected):
    """The header of a further answer that some templates write behind every conversation belongs to no turn."""
    assert learnt(template, turns, role) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA3, HEADER),
        (R7B, OPENS),
        (ROLES, "<|assistant|>"),
        (HASHES.replace("END", "''"), "### assistant:\n"),
        *(
            (each, "")
            for each in (PLAIN, NO_PROMPT, ENDS_TEXT, CLOSES_LAST, NEMOTRON, HARMONY, TEMPLATES["whitespace"])
        ),
    ],
)
@pytest.mark.parametrize("turns", [TALK, TALK[:3], [ASK], [HI]])
def test_only_a_header_that_nobody_asked_for_is_one(template, expected, turns):
    assert Rendering(ChatTemplate(template), turns, {}, SPECIAL).header == expected
