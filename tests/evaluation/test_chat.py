"""Chat templates: the text that transformers makes of a conversation, and what happens without one."""

import json

import pytest

from megatron.errors import ConfigError
from megatron.evaluation.chat import ChatTemplate

SOURCE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'nobody' %}{{ raise_exception('nobody may not speak') }}{% endif %}
<|{{ message['role'] }}|>
{{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
TURNS = [{"role": "user", "content": " What is it? "}, {"role": "assistant", "content": "A test & <more>."}]


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("prompted", [True, False])
def test_the_text_is_that_of_transformers(tmp_path, as_file, prompted):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    if as_file:
        (tmp_path / "chat_template.jinja").write_text(SOURCE)
    else:
        config["chat_template"] = SOURCE
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>", chat_template=SOURCE
    )
    wanted = theirs.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=prompted)
    assert ChatTemplate.beside(str(tmp_path / "tokenizer.json")).render(TURNS, prompted) == wanted


def test_a_missing_or_broken_template_is_the_users_mistake(tmp_path):
    with pytest.raises(ConfigError, match="no chat template"):
        ChatTemplate.beside(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="no chat template"):
        ChatTemplate.beside(None)
    with pytest.raises(ConfigError, match="cannot be read"):
        ChatTemplate("{% for %}", {})
    with pytest.raises(ConfigError, match="nobody may not speak"):
        ChatTemplate(SOURCE, {}).render([{"role": "nobody", "content": ""}])


def test_a_template_cannot_leave_its_sandbox():
    from jinja2.exceptions import SecurityError

    with pytest.raises(SecurityError):
        ChatTemplate("{{ messages.__class__.__mro__ }}", {}).render(TURNS)
