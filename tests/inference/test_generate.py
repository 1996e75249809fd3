"""Texts, records and modes: what a user of generate.py sees, apart from loading a checkpoint."""

import io
import json
import math

import pytest
import torch

from megatron.errors import ConfigError, RunError
from megatron.inference import batch_modes
from megatron.inference.batch_generation import TextGenerator
from megatron.inference.generation_request import GenerationRequest, Settings
from megatron.inference.interactive import Interruption, run_interactive
from megatron.inference.runner import check_ends
from megatron.inference.sampling import Sampling
from megatron.inference.token_loop import TokenLoop
from megatron.tokenizers.char_level import CharLevelTokenizer
from tests.inference.small_model import SEQUENCE, SmallEngine, small_config


@pytest.fixture(scope="module")
def engine():
    return SmallEngine(small_config())


def generator(engine, **settings):
    return TextGenerator(engine, CharLevelTokenizer(), Settings(**{**DEFAULTS, **settings}))


DEFAULTS = {"sampling": Sampling(temperature=1.0), "seed": 1, "maximum_tokens": 12, "seq_length": SEQUENCE}


class Spelling(CharLevelTokenizer):
    """Every token is a letter, so that texts are readable and stop texts are easy to find."""

    def decode(self, ids):
        return "".join(chr(ord("a") + token % 26) for token in ids)


def test_a_record_has_the_public_fields(engine):
    record = generator(engine).continue_text("What is it?")
    fields = json.loads(json.dumps(record.as_json()))
    assert list(fields) == ["context", "text", "length", "finished", "message", "duration_seconds"]
    assert fields["context"] == "What is it?"
    assert isinstance(fields["text"], str)
    assert 0 < fields["length"] <= 12
    assert fields["message"] is None
    assert 0 < fields["duration_seconds"] < 60


def test_a_prompt_without_room_is_an_error_of_that_prompt_only(engine, tmp_path):
    path = tmp_path / "out.jsonl"
    contexts = ["short", "x" * SEQUENCE, "short"]
    batch_modes.run_over(generator(engine), contexts, path, writes=True)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["text"] is None for record in records] == [False, True, False]
    assert records[1]["length"] == 0
    assert f"{SEQUENCE} tokens" in records[1]["message"] and "seq_length" in records[1]["message"]


@pytest.mark.parametrize("width", [32, 64])  # attention through torch and through the compiled loop
@pytest.mark.parametrize("rows", [1, 3])
def test_scores_that_are_no_numbers_end_one_text_only(tmp_path, caplog, width, rows):
    broken = SmallEngine(small_config(hidden_size=width))
    contexts = ["first", "a long one with z in it", "another", "the last of them"]
    full = [record.text for record in generator(broken, batch_size=rows).continue_all(contexts)]
    with torch.no_grad():
        broken.module.state_dict()["sequential.0.word_embeddings.weight"][ord("z")] = math.nan
    path = tmp_path / "out.jsonl"
    batch_modes.run_over(generator(broken, batch_size=rows), contexts, path, writes=True)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert "not numbers" in records[1]["message"] and not records[1]["finished"] and records[1]["text"] is None
    assert [record["text"] for record in records[:1] + records[2:]] == full[:1] + full[2:]
    reported = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(reported) == 1 and reported[0].startswith("prompt 2: error")


def test_when_no_prompt_has_room_the_run_fails(engine, tmp_path):
    with pytest.raises(RunError, match="none of the 2 prompts"):
        batch_modes.run_over(generator(engine), ["x" * SEQUENCE] * 2, tmp_path / "out.jsonl", writes=True)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_a_long_prompt_is_warned_about_and_stops_at_the_context(engine):
    record = generator(engine, maximum_tokens=1000).continue_text("y" * 40)
    assert record.message.startswith("warning") and "40 of the 48" in record.message
    assert record.finished or record.length == SEQUENCE - 40


def test_an_empty_context_starts_a_document(engine):
    first = generator(engine, sampling=Sampling()).continue_text("")
    assert first.text is not None and first.length > 0


def test_texts_repeat_with_the_seed_and_differ_by_number(engine):
    one, two = generator(engine), generator(engine, recompute=True)
    assert one.continue_text("abc", text_index=4).text == two.continue_text("abc", text_index=4).text
    assert one.continue_text("abc", text_index=5).text != one.continue_text("abc", text_index=4).text


def test_a_stop_text_ends_the_text_and_is_cut_off(engine):
    plain = TextGenerator(engine, Spelling(), Settings(**DEFAULTS)).continue_text("q")
    assert plain.length == 12
    stop = plain.text[4:7]
    stopped = TextGenerator(engine, Spelling(), Settings(**DEFAULTS, stop=(stop,))).continue_text("q")
    assert stopped.text == plain.text[: plain.text.index(stop)]
    assert stopped.finished
    assert stopped.length == plain.text.index(stop) + 3


def new_tokens(engine, **settings):
    """The tokens of an answer, and its record."""
    tokens = []
    made = GenerationRequest(
        Spelling(), Settings(**DEFAULTS, **settings), [1, 2], on_token=lambda token, _: tokens.append(token)
    )
    loop = TokenLoop(engine, rows=1, max_length=SEQUENCE)
    steps = loop.join([made.growing])
    while not made.take(steps[0]) and not made.growing.ended:
        steps = loop.step()
    return tokens, made.record()


def test_further_tokens_end_a_text_and_leave_none(engine):
    plain, full = new_tokens(engine)
    assert len(plain) == 12 and not full.finished
    retained = plain[: plain.index(plain[5])]
    tokens, record = new_tokens(engine, end_ids=(511, plain[5]))
    assert (tokens, record.finished, record.length) == (retained, True, len(retained))
    assert record.text == Spelling().decode(retained)


def test_a_stop_text_that_is_a_special_token_ends_a_text(engine, monkeypatch):
    plain, _ = new_tokens(engine)
    monkeypatch.setattr(Spelling, "special_tokens", {"<|im_end|>": plain[5]})
    tokens, record = new_tokens(engine, stop=("<|im_end|>",))
    assert (tokens, record.finished) == (plain[: plain.index(plain[5])], True)


@pytest.mark.parametrize(
    ("ids", "reported"), [([7, 512], "the vocabulary has 512 tokens, so there is no 512"), ([600, 700], "no 600, 700")]
)
def test_ends_that_the_vocabulary_lacks_are_refused(ids, reported):
    check_ends([0, 511], CharLevelTokenizer())
    check_ends(None, CharLevelTokenizer())
    with pytest.raises(ConfigError, match=reported) as caught:
        check_ends(ids, CharLevelTokenizer())
    assert caught.value.issues[0].key == "eos_token_ids"


@pytest.mark.parametrize("stop", [(), ("zz", "never seen")])
def test_streamed_parts_are_the_text(engine, stop):
    for tokenizer in (CharLevelTokenizer(), Spelling()):
        parts = []
        record = TextGenerator(engine, tokenizer, Settings(**DEFAULTS, stop=stop)).continue_text(
            "hello", stream=parts.append
        )
        assert "".join(parts) == record.text
    assert len(parts) > 1  # of the tokenizer with a letter a token


def test_logits_are_those_of_the_generated_tokens(engine):
    record = generator(engine, sampling=Sampling(), return_logits=True).continue_text("abc")
    tokens = [max(range(512), key=row.__getitem__) for row in record.as_json()["logits"]]
    assert len(tokens) == record.length
    assert CharLevelTokenizer().decode(tokens) == record.text


def test_only_the_writing_rank_touches_the_file(engine, tmp_path):
    batch_modes.run_over(generator(engine), ["a"], tmp_path / "out.jsonl", writes=False)
    assert list(tmp_path.iterdir()) == []


def test_shown_texts_hold_prompt_and_continuation(engine, tmp_path):
    shown = io.StringIO()
    batch_modes.run_over(generator(engine), ["hello"], tmp_path / "out.jsonl", writes=True, show=shown)
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert shown.getvalue() == f"--- text 1, {record['length']} tokens\nhello{record['text']}\n"


def test_prompts_are_parted_stripped_and_never_empty(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("  one \n\n\ntwo words\n", encoding="utf-8")
    assert batch_modes.read_prompts(str(file), "\n") == ["one", "two words"]
    file.write_text("one\ntwo<end> drei <end>\n", encoding="utf-8")
    assert batch_modes.read_prompts(str(file), "<end>") == ["one\ntwo", "drei"]
    file.write_text("one\ntwo\n", encoding="utf-8-sig")
    assert batch_modes.read_prompts(str(file), "\n") == ["one", "two"]


@pytest.mark.parametrize(
    "content", [None, b"", b" \n\n", b"\xff\xfe\xff"], ids=["missing", "empty", "blank", "not text"]
)
def test_unusable_prompt_files_are_the_users_issue(tmp_path, content):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="sample_input_file"):
        batch_modes.read_prompts(str(file), "\n")


def test_the_mode_follows_from_the_prompt_file_unless_given():
    assert batch_modes.chosen_mode(None, None) == "unconditional"
    assert batch_modes.chosen_mode(None, "prompts.txt") == "input-file"
    assert batch_modes.chosen_mode("interactive", "prompts.txt") == "interactive"
    with pytest.raises(ConfigError, match="text_gen_type = 'chat'"):
        batch_modes.chosen_mode("chat", None)


def test_output_names_are_the_public_ones():
    assert str(batch_modes.output_path("out.jsonl", "in.txt")) == "out.jsonl"
    assert str(batch_modes.output_path(None, "in.txt")) == "in.txt.output.jsonl"
    with pytest.raises(ConfigError, match="sample_output_file"):
        batch_modes.output_path("./in.txt", "in.txt")


def test_a_conversation_answers_every_prompt_and_ends_with_the_input(engine):
    out = io.StringIO()
    shared = []

    def share(ask):
        shared.append(ask())
        return shared[-1]

    source = io.StringIO("hello\n\nwhat\nis it?<end>\n")
    run_interactive(generator(engine), "\n", is_main_rank=True, share=share, source=source, target=out)
    assert shared == ["hello", "what", "is it?<end>", None]
    answer = generator(engine).continue_text("hello", text_index=0).text
    assert out.getvalue().startswith(f"prompt> {answer}\nprompt> ")
    shared.clear()
    source.seek(0)
    run_interactive(generator(engine), "<end>", is_main_rank=True, share=share, source=source, target=out)
    assert shared == ["hello\n\nwhat\nis it?", None]


def answers(engine, typed, interruption=None, **settings):
    """What a person reads who types these lines."""
    out = io.StringIO()
    run_interactive(
        TextGenerator(engine, Spelling(), Settings(**{**DEFAULTS, "sampling": Sampling(), **settings})),
        "\n",
        is_main_rank=True,
        share=lambda ask: ask(),
        interruption=interruption,
        source=io.StringIO("".join(line + "\n" for line in typed)),
        target=out,
    )
    return out.getvalue().split("prompt> ")[1:-1]


def test_a_turn_follows_from_those_before_until_they_are_forgotten(engine):
    first, second = answers(engine, ["hello", "what"], maximum_tokens=5)
    alone = TextGenerator(engine, Spelling(), Settings(**{**DEFAULTS, "sampling": Sampling(), "maximum_tokens": 5}))
    assert first == alone.continue_text("hello").text + "\n"
    assert second == alone.continue_text(f"hello{first}what").text + "\n"
    *_, again = answers(engine, ["hello", "/new", "what"], maximum_tokens=5)
    assert again == alone.continue_text("what").text + "\n"


def test_old_turns_make_room_for_new_ones(engine):
    many = answers(engine, ["a turn of some length"] * 5, maximum_tokens=5)
    assert len(many) == 5 and all(len(each) == 6 for each in many)


def test_an_interruption_stops_one_answer_only(engine):
    class Impatient(Interruption):
        """Presses Ctrl-C while the first answer is written."""

        pressed_once = False

        def clear(self, *, answering):
            super().clear(answering=answering)
            if answering and not self.pressed_once:
                self.pressed = self.pressed_once = True

    first, second = answers(engine, ["hello", "what"], Impatient(), maximum_tokens=9)
    assert len(first) == 2  # one token and the line's end
    assert len(second) == 10
