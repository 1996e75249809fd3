"""Prompts in a chat template: the text that lm-eval's own `hf` model makes of them."""

from types import SimpleNamespace

import pytest
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from megatron.config import Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.errors import ConfigError
from megatron.evaluation import runner
from megatron.evaluation.lm_eval_model import HarnessModel
from megatron.tokenizers.char_level import CharLevelTokenizer
from megatron.tokenizers.chat_template import ChatTemplate
from tests.inference.small_model import small_config
from tests.tokenizers.test_chat_template import PLAIN, TEMPLATES, folder_with

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "The answer is "},
]


def ours(folder, kind, file):
    model = HarnessModel.__new__(HarnessModel)
    model._chat = ChatTemplate.of_tokenizer(kind, str(folder / file), key="eval_chat_template")
    return model


@pytest.mark.parametrize(("kind", "file"), [("PretrainedFromHF", ""), ("HFTokenizer", "tokenizer.json")])
@pytest.mark.parametrize("template", [PLAIN, NO_SYSTEM, TEMPLATES["generation"], TEMPLATES["guarded date"]])
@pytest.mark.parametrize("prompted", [True, False])
def test_prompts_are_those_of_the_hf_model(tmp_path, kind, file, template, prompted):
    """With a template that refuses a system too, and with an answer that is begun for the model."""
    folder = folder_with(tmp_path, template)
    theirs = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(folder), chat_template_args={})
    history = HISTORY[:2] if prompted else HISTORY
    expected = HFLM.apply_chat_template(theirs, history, prompted)
    assert ours(folder, kind, file).apply_chat_template(history, prompted) == expected


def test_a_conversation_that_no_template_takes_is_the_users_issue(tmp_path):
    model = ours(folder_with(tmp_path, "{{ raise_exception('never') }}"), "PretrainedFromHF", "")
    with pytest.raises(ConfigError, match="refuses the conversation: never") as caught:
        model.apply_chat_template(HISTORY, True)
    assert caught.value.issues[0].key == "eval_chat_template"


def test_cached_requests_are_named_by_template_and_special_tokens():
    chats = [
        None,
        ChatTemplate(PLAIN),
        ChatTemplate(NO_SYSTEM),
        ChatTemplate(PLAIN, {"bos_token": "<s>"}),
        ChatTemplate({"default": PLAIN, "tool_use": NO_SYSTEM}),
    ]
    parts = small_config(), None, CharLevelTokenizer(), Topology.single()
    names = [runner._harness_model(*parts, chat).tokenizer_name for chat in chats]
    assert len(set(names)) == len(chats)
    assert names[1] == runner._harness_model(*parts, ChatTemplate(PLAIN)).tokenizer_name


def test_the_template_of_a_folder_is_found_from_the_configuration(tmp_path, monkeypatch):
    folder = folder_with(tmp_path / "model", PLAIN)
    (tmp_path / "chat_template.jinja").write_text("that of the folder above")
    monkeypatch.setattr(runner, "require_harness", lambda tasks: None)
    monkeypatch.setattr("megatron.evaluation.tasks.Tasks", lambda *_: SimpleNamespace(check=lambda *_: None))
    values = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "seq_length": 8,
        "train_iters": 1,
        "train_batch_size": 1,
    }
    values |= {"tokenizer_type": "PretrainedFromHF", "vocab_file": str(folder), "eval_chat_template": True}
    _, chat = runner._load_tasks(resolve([], values, Resources(1)).config)
    assert chat is not None
    assert chat.source == PLAIN
