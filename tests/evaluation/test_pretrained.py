"""SmolLM2, a real chat model: scores are those of lm-eval's own model, and answers end where transformers ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance

from megatron.config import Config, Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_inference_engine
from megatron.engine.vocabulary import vocabulary_size
from megatron.evaluation.lm_eval_model import HarnessModel
from megatron.inference.batch_generation import TextGenerator
from megatron.inference.runner import _settings
from megatron.tokenizers import build_tokenizer
from megatron.tokenizers.chat_template import ChatTemplate
from tests.checkpoint.huggingface.test_pretrained import ours, theirs

__all__ = ["ours", "theirs"]  # fixtures

pytestmark = pytest.mark.registry

LENGTH = 256
PAIRS = [
    ("The capital of France is", " Paris."),
    ("Question: What is two and two?\nAnswer: ", "four"),
    ("", "Once upon a time there was a cat."),
    ("def double(x):\n    return", " 2 * x\n"),
    ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello! How can I help you?<|im_end|>"),
]
QUESTIONS = ("What is the capital of France?", "Name a colour.")


@pytest.fixture(scope="module")
def config(ours: Path) -> Config:
    reported: dict[str, Any] = yaml.safe_load((ours / "model.yml").read_text())
    reported |= {"load": str(ours), "seq_length": LENGTH, "maximum_tokens": 40, "user_script": "generate.py"}
    return resolve([], reported, Resources(1)).config.for_inference()


@pytest.fixture(scope="module")
def both(config: Config, theirs: Path) -> tuple[HarnessModel, Any]:
    from lm_eval.models.huggingface import HFLM

    tokenizer = build_tokenizer(config.tokenizer)
    engine = build_inference_engine(config, Topology.single(), 49152)
    named = config.tokenizer
    model = HarnessModel(
        engine,
        tokenizer,
        max_length=LENGTH,
        batch_size=2,
        chat=ChatTemplate.of_tokenizer(named.tokenizer_type, named.vocab_file),
        end_ids=config.generation.eos_token_ids or (),
        vocabulary=vocabulary_size(config, tokenizer),
    )
    # In fp32 its own sums over long windows are off by 2e-3.
    how = {"dtype": "float32", "softmax_dtype": "float64", "batch_size": 2, "max_length": LENGTH, "device": "cpu"}
    return model, HFLM(pretrained=str(theirs), **how)


def asked(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def conversations(lm: Any) -> list[str]:
    return [lm.apply_chat_template([{"role": "user", "content": question}]) for question in QUESTIONS]


def test_scores_are_those_of_lm_evals_own_model(both: tuple[HarnessModel, Any]) -> None:
    mine, other = both
    assert conversations(mine) == conversations(other)
    pairs = [*PAIRS, *((text, answer) for text in conversations(mine) for answer in ("Paris", " Red.", "I"))]
    found, expected = (lm.loglikelihood(asked("loglikelihood", pairs)) for lm in both)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    rolling = asked("loglikelihood_rolling", [("The rain fell in torrents. " * 60,), ("A short one.",)])
    assert mine.loglikelihood_rolling(rolling) == pytest.approx(other.loglikelihood_rolling(rolling), abs=3e-4)


def test_answers_end_where_transformers_ends(both: tuple[HarnessModel, Any], config: Config) -> None:
    mine, other = both
    texts = conversations(mine)
    generator = TextGenerator(mine._engine, mine._text_tokenizer, _settings(config))
    records = list(generator.continue_all(texts))
    assert any(record.finished for record in records)
    for text, record in zip(texts, records, strict=True):
        prompt = torch.tensor([other.tokenizer(text).input_ids])
        made = other.model.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
        assert record.text == other.tokenizer.decode(made, skip_special_tokens=True)
        ended = int(made[-1]) in {other.tokenizer.eos_token_id}
        assert record.finished == ended
        assert record.length == len(made) - ended
