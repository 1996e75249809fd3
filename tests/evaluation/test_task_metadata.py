"""Tasks that make their own data get the tokenizer and `eval_metadata`; an error of a task's code names the task."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from megatron.errors import RunError
from megatron.evaluation import runner
from megatron.evaluation.lm_eval_model import HarnessModel
from megatron.evaluation.tasks import Tasks
from megatron.tokenizers.char_level import CharLevelTokenizer
from tests.inference.small_model import SEQUENCE, SmallEngine, small_config
from tests.tokenizers import made

TASK = """
task: made_here
custom_dataset: !function own.make
test_split: test
output_type: multiple_choice
doc_to_text: {prompt}
doc_to_choice: ["a", "b"]
doc_to_target: 0
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""
RULER = """
import datasets
from lm_eval.tasks.ruler.common_utils import get_tokenizer, resolve_tokenizer_name

def make(**given):
    tokenizer = get_tokenizer(resolve_tokenizer_name(given))
    lengths = [len(tokenizer("the quick brown fox").input_ids), *given.get("max_seq_lengths", [4096])]
    return {"test": datasets.Dataset.from_list([{"length": length} for length in lengths])}

def prompt(document):
    return str(document["length"]) if document["length"] < 100 else document["question"]
"""


def written(folder, code, prompt='"{{length}}"'):
    (folder / "own.py").write_text(code)
    (folder / "made.yaml").write_text(TASK.format(prompt=prompt))
    return str(folder)


@pytest.mark.parametrize("file", ["", "tokenizer.json"])
def test_the_tokenizer_and_the_settings_reach_the_task(tmp_path, file):
    """RULER's own functions."""
    from transformers import AutoTokenizer

    folder = made.chatml(tmp_path / "tokenizer")
    count = len(AutoTokenizer.from_pretrained(folder)("the quick brown fox").input_ids)
    given = {"tokenizer_type": "PretrainedFromHF", "vocab_file": str(folder / file), "eval_tasks": ["made_here"]}
    given |= {"eval_include_path": written(tmp_path, RULER)}
    config = small_config(**given)
    for more, lengths in ({}, [4096]), ({"eval_metadata": {"max_seq_lengths": [64, 128]}}, [64, 128]):
        tasks, _ = runner._load_tasks(config.replace(**more))
        documents = tasks._loaded["tasks"]["made_here"].dataset["test"]
        assert [each["length"] for each in documents] == [count, *lengths]


FAILING = {
    "assertion": (RULER, r"cannot load the task made_here: AssertionError: No tokenizer or pretrained.*eval_metadata"),
    "import": ("import no_such_package\n", r"cannot load the task made_here: ModuleNotFoundError.*install"),
    "value": ("def make(**given):\n    raise ValueError('odd')\n", r"cannot load the task made_here: odd"),
    "missing": (
        "def make(**given):\n    return open('/nowhere/x')\n",
        r"task made_here: .*nowhere.*HF_DATASETS_OFFLINE",
    ),
    "key": ("def make(**given):\n    return given['length']\n", r"cannot load the task made_here: KeyError: 'length'"),
    "silent": ("def make(**given):\n    assert False\n", r"cannot load the task made_here: AssertionError;"),
    "arguments": ("def make():\n    return {}\n", r"cannot load the task made_here: TypeError: .*unexpected keyword"),
    "nothing": ("def make(**given):\n    return None\n", r"cannot load the task made_here: \w+Error"),
}


@pytest.mark.parametrize("failing", FAILING)
def test_an_error_while_a_task_is_loaded_names_it(tmp_path, failing):
    code, expected = FAILING[failing]
    with pytest.raises(RunError, match=expected) as caught:
        Tasks(["made_here"], written(tmp_path, code))
    assert caught.value.issues[0].value in ("made_here", ["made_here"])


def test_an_error_while_prompts_are_made_names_the_task(tmp_path):
    folder = str(made.chatml(tmp_path / "tokenizer"))
    tasks = Tasks(["made_here"], written(tmp_path, RULER, "!function own.prompt"), metadata={"tokenizer": folder})
    model = HarnessModel(SmallEngine(small_config()), CharLevelTokenizer(), max_length=SEQUENCE, batch_size=2)
    with pytest.raises(RunError, match="the prompts of the task made_here cannot be made: KeyError: 'question'"):
        tasks.run(model)
