"""Conversations with tools, parts and variables through the tool: what is written, left out and counted."""

import json

import pytest

from megatron.data.indexed.reader import IndexedDataset
from tests.tokenizers.test_chat_template import DOCUMENT, PLAIN, TOOL, folder_with
from tests.tokenizers.test_chat_tools import AS_TEXT, JSON_CALLS, MAPPING, parts, with_calls
from tools.preprocess_data_with_chat_template import main

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def written(tmp_path, template, records, *flags):
    """The exit code and the documents of a work on these lines."""
    folder, source = folder_with(tmp_path / "t", template), tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    reported = ["--input", str(source), "--output-prefix", str(tmp_path / "out"), "--tokenizer-path", str(folder)]
    code = main([*reported, "--jsonl-keys", "messages", *flags])
    return code, [] if code else list(IndexedDataset(tmp_path / "out_messages_document"))


LINES = [
    {"messages": with_calls(MAPPING)},
    {"messages": with_calls(MAPPING), "tools": [TOOL]},
    {"messages": TURNS, "tools": None, "documents": None, "chat_template_kwargs": None},
    {"messages": TURNS, "tools": [], "documents": [DOCUMENT]},
    {"messages": TURNS, "chat_template_kwargs": {"style": "calm", "documents": [DOCUMENT]}},
    {"messages": TURNS, "id": 7, "source": "x"},
]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_fields_of_a_line_go_to_the_template(tmp_path, workers):
    from transformers import AutoTokenizer

    code, found = written(tmp_path, JSON_CALLS, LINES, "--workers", workers, "--no-mask")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert code == 0 and len(found) == len(LINES)
    for row, record in zip(found, LINES, strict=True):
        how = {name: record.get(name) for name in ("tools", "documents")} | (record.get("chat_template_kwargs") or {})
        expected = theirs.apply_chat_template(record["messages"], return_dict=False, **how)
        assert row.tolist() == [*expected, theirs.eos_token_id]


def test_tools_and_arguments_may_be_json_in_a_text(tmp_path):
    records = [
        {"messages": with_calls(MAPPING), "tools": [TOOL]},
        {"messages": with_calls(AS_TEXT), "tools": json.dumps([TOOL])},
    ]
    code, (one, other) = written(tmp_path, JSON_CALLS, records)
    assert code == 0 and one.tolist() == other.tolist()


def test_the_labels_are_what_the_assistant_wrote(tmp_path):
    from transformers import AutoTokenizer

    assert written(tmp_path, JSON_CALLS, LINES[1:2])[0] == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    labels = IndexedDataset(tmp_path / "out_messages_label_document")[0].tolist()
    reported = theirs.decode([label for label in labels if label != -100])
    calls = '<call>weather {"b": 1, "a": ["é", null]}</call><call>weather {}</call><|im_end|>\n'
    assert reported == calls + "Dry.<|im_end|>\n" + "<|im_end|>"


IMAGE = {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image", "url": "x.png"}]}


@pytest.mark.parametrize(
    ("record", "reported"),
    [
        ({"messages": [TURNS[0], IMAGE]}, "1 with a part of a content that is no text"),
        ({"messages": [TURNS[0], IMAGE]}, "turn 2 has a part of the type 'image'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "turn 1 has a part 'a'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "that is no text"),
        ({"messages": [{"role": "user", "content": None}]}, "whose 'content' is not text"),
        ({"messages": [{"role": "user"}]}, "a turn has a 'content', or 'tool_calls' in its place"),
        ({"messages": [{"role": "assistant", "tool_calls": "f()"}]}, "whose 'tool_calls' are no list of calls"),
        ({"messages": [{"role": "assistant", "tool_calls": ["f()"]}]}, "turn 1 has ['f()']"),
        ({"messages": with_calls("{")}, "turn 2: the arguments of weather are no JSON"),
        ({"messages": with_calls({"a": "\ud800"})}, "that holds half a surrogate pair"),
        ({"messages": [parts("\ud800")]}, "that holds half a surrogate pair"),
        ({"messages": TURNS, "tools": "weather"}, "whose 'tools' is a text that is no JSON"),
        ({"messages": TURNS, "tools": ["weather"]}, "whose 'tools' is no list of objects"),
        ({"messages": TURNS, "documents": "a book"}, "whose 'documents' is no list of objects"),
        ({"messages": TURNS, "chat_template_kwargs": {"documents": ["x"]}}, "whose 'documents' is no list of objects"),
        ({"messages": TURNS, "chat_template_kwargs": ["style"]}, "whose 'chat_template_kwargs' is no object"),
        ({"messages": TURNS, "chat_template_kwargs": {"tools": [TOOL]}}, "set what is a field of the line"),
        ({"messages": TURNS, "chat_template_kwargs": {"messages": []}}, "'messages' is no variable"),
    ],
)
def test_what_cannot_be_learnt_is_left_out_counted_and_reported(tmp_path, capsys, record, reported):
    code, found = written(tmp_path, JSON_CALLS, [record, LINES[0]])
    out = capsys.readouterr().out
    retained = (tmp_path / "out_messages_document_skipped.jsonl", tmp_path / "out_skipped.jsonl")
    skipped = "".join(path.read_text() for path in retained if path.is_file())
    assert code == 0 and len(found) == 1
    assert "1 lines or files skipped" in out and json.loads(skipped)
    assert written(tmp_path, JSON_CALLS, [record])[0] == 1
    assert reported in capsys.readouterr().err


def test_what_the_template_leaves_out_is_counted(tmp_path, capsys):
    """The ids are those of transformers all the same."""
    code, found = written(tmp_path, PLAIN, [*LINES[:2], *LINES[2:4], LINES[5]])
    out = capsys.readouterr().out
    assert code == 0 and len(found) == 5
    for reported in ("2 documents have 'tool_calls'", "1 documents have 'tools'", "1 documents have 'documents'"):
        assert f"{reported} that the chat template leaves out" in out


@pytest.mark.parametrize(("flags", "count"), [((), 2), (("--workers", "2"), 2), (("--generation-role", "user"), 0)])
def test_reasoning_that_the_template_leaves_out_is_counted(tmp_path, capsys, flags, count):
    """In whichever of the two forms it is."""
    cuts = PLAIN.replace("m['content']", "m['content'].split('</think>')[-1]")
    field = [TURNS[0], {**TURNS[1], "reasoning_content": "because"}]
    inline = [TURNS[0], {**TURNS[1], "content": "<think>because</think>b"}]
    code, found = written(tmp_path, cuts, [{"messages": turns} for turns in (field, inline, TURNS, inline)], *flags)
    out = capsys.readouterr().out
    assert code == 0 and len(found) == 4
    for name, expected in (("content", count), ("reasoning_content", count // 2)):
        reported = f"{expected} documents have '{name}' in a turn that is learnt, of which the chat template leaves out"
        assert (reported in out) == bool(count) and ("edit the template" in out) == bool(count)


OTHER_ROLES = [{"role": "user", "content": "a"}, {"role": "gpt", "content": "b"}]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
BARE = "hold nothing that the role '{}' wrote, so that nothing carries a loss"
LAST = "hold nothing that carries a loss, since their last turn is none of the role '{}'"


@pytest.mark.parametrize(
    ("template", "conversations", "flags", "reported"),
    [
        (PLAIN, [OTHER_ROLES, OTHER_ROLES], (), "2 documents " + BARE.format("assistant")),
        (PLAIN, [TURNS, TURNS[:1], OTHER_ROLES], ("--workers", "2"), "2 documents " + BARE.format("assistant")),
        (PLAIN, [TURNS, OTHER_ROLES], ("--generation-role", "gpt"), "1 documents " + BARE.format("gpt")),
        (MARKED, [TURNS, OTHER_ROLES], (), "1 documents " + BARE.format("assistant")),
        (PLAIN, [TURNS, TURNS], (), None),
        (PLAIN, [OTHER_ROLES], ("--generation-role", "gpt"), None),
        (PLAIN, [TURNS, TURNS[:1], OTHER_ROLES], ("--only-last",), "2 documents " + LAST.format("assistant")),
        (MARKED, [TURNS, TURNS * 2 + TURNS[:1]], ("--only-last",), "1 documents " + LAST.format("assistant")),
        (PLAIN, [OTHER_ROLES], ("--only-last", "--generation-role", "gpt"), None),
        (PLAIN, [OTHER_ROLES], ("--no-mask",), None),
        (PLAIN, [OTHER_ROLES], ("--for-rm",), None),
    ],
)
def test_conversations_without_a_word_to_learn_are_counted(tmp_path, capsys, template, conversations, flags, reported):
    code, found = written(tmp_path, template, [{"messages": turns} for turns in conversations], *flags)
    out = capsys.readouterr().out
    assert code == 0 and len(found) == len(conversations)
    assert reported in out if reported else "hold nothing" not in out
    labels = [row[:-1].tolist() for row in IndexedDataset(tmp_path / "out_messages_label_document")]
    bare = sum(all(label == -100 for label in row) for row in labels)
    if "--for-rm" not in flags:
        assert bare == (int(reported.split()[0]) if reported else 0)


ASKED, ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
ENDS = [
    ([ASKED, ANSWERED], (), True),
    ([ASKED, ANSWERED, ASKED], (), False),
    ([ASKED, {**ANSWERED, "weight": 0}], (), False),
    ([ASKED, ANSWERED, ASKED], ("--only-last",), False),
    ([ASKED, ANSWERED, ASKED], ("--only-last", "--generation-role", "user"), True),
    ([ASKED, ANSWERED], ("--only-last",), True),
    ([ASKED, ANSWERED, ASKED], ("--generation-role", "user"), True),
    ([ASKED, ANSWERED, ASKED], ("--no-mask",), True),
]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize(("turns", "flags", "learnt"), ENDS)
def test_the_end_of_text_carries_a_loss_where_the_last_turn_does(tmp_path, template, turns, flags, learnt):
    """Behind a question it would teach the model to end in place of an answer."""
    code, found = written(tmp_path, template, [{"messages": turns}], *flags)
    (labels,) = IndexedDataset(tmp_path / "out_messages_label_document")
    assert code == 0 and labels[-1] == (found[0][-1] if learnt else -100)


ALWAYS_OPENS = PLAIN.partition("{% if add")[0] + "{{ '<|im_start|>assistant' }}\n{{ '' }}"


@pytest.mark.parametrize("turns", [[ASKED, ANSWERED], [ASKED, ANSWERED, ASKED, ANSWERED]])
def test_the_end_of_text_behind_a_header_that_nobody_answers_is_not_learnt(tmp_path, turns):
    """It would teach the model to end where it is to begin; the template writes the header behind every last turn."""
    code, (tokens,) = written(tmp_path, ALWAYS_OPENS, [{"messages": turns}])
    (labels,) = IndexedDataset(tmp_path / "out_messages_label_document")
    assert code == 0 and labels[-1] == -100
    ended = written(tmp_path, PLAIN, [{"messages": turns}])[1][0]
    (expected,) = IndexedDataset(tmp_path / "out_messages_label_document")
    assert tokens.tolist()[: len(ended) - 1] == ended.tolist()[:-1] and expected[-1] == ended[-1]
    assert labels.tolist()[: len(ended) - 1] == expected.tolist()[:-1]
    assert set(labels.tolist()[len(ended) - 1 :]) == {-100}
