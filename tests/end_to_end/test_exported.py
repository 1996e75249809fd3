"""One trained checkpoint, asked here and, exported, in transformers and in lm-eval's own `hf` model: the same answers.

The prompts and the four task sets are made of the documentation in this installation's standard library: choosing the
sentence that goes on, guessing a last word, the likelihood of whole documents in rolling windows, and writing on.
"""

from __future__ import annotations

import ast
import json
import os
import random
import sysconfig
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from megatron.config import Resources, resolve
from megatron.data.indexed.writer import DatasetWriter
from megatron.evaluation import runner as evaluation_run
from megatron.inference import runner as inference_run
from megatron.inference.runner import generate
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.trainer import train_byte_level_bpe
from tests.end_to_end.runs import BASE, run
from tests.layouts import pick
from tests.multi_rank import run_distributed
from tools import convert_to_hf

pytestmark = pytest.mark.long
SEQUENCE, NEW, PROMPTS = 128, 24, 50
LAYOUTS = pick("one process", "tensor 2", "pipeline 2", "data 2")
MANNERS: dict[str, dict[str, Any]] = {
    "batch 1": {"generation_batch_size": 1},
    "batch 8": {"generation_batch_size": 8},
    "batch 1, no cache": {"generation_batch_size": 1, "recompute": True},
    "batch 8, no cache": {"generation_batch_size": 8, "recompute": True},
}
EVALUATIONS: dict[str, dict[str, Any]] = {
    "batch 1": {"eval_batch_size": 1},
    "batch 8": {"eval_batch_size": 8},
    "two examples": {"eval_batch_size": 8, "eval_num_fewshot": 2, "eval_tasks": ["last_word"]},
}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {name}.jsonl
test_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: {metric}
{more}
"""
TASKS = {
    "next_sentence": ("multiple_choice", "acc", 'doc_to_choice: "{{choices}}"'),
    "last_word": ("loglikelihood", "acc", ""),
    "documents": ("loglikelihood_rolling", "word_perplexity", ""),
    "writing": (
        "generate_until",
        "exact_match",
        'generation_kwargs:\n  until: [".", "\\n\\n"]\n  max_gen_toks: 16\n  do_sample: false',
    ),
}


def documentation() -> list[str]:
    """What the modules of the standard library say of themselves, sentences on single lines."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        reported = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8", errors="replace"))) or ""
        text = " ".join(reported.split())
        if len(text) > 200 and text.isascii():
            found.append(text)
    return found


def write_tasks(folder: Path, texts: list[str]) -> None:
    """The four sets and their task files."""
    chance = random.Random(4)
    sentences = [text.split(". ") for text in texts]
    reported = [parts for parts in sentences if len(parts) > 3 and all(15 < len(part) < 200 for part in parts[:3])]
    endings = [parts[2] for parts in reported]
    choices = []
    for number, parts in enumerate(reported[:30]):
        others = chance.sample([each for each in endings if each != parts[2]], 3)
        options = [*others[: number % 4], parts[2], *others[number % 4 :]]
        question = ". ".join(parts[:2]) + "."
        choices.append({"question": question, "choices": options, "answer": number % 4})
    words = [text[: 150 + number].strip().rsplit(" ", 1) for number, text in enumerate(texts[:30])]
    sets = {
        "next_sentence": choices,
        "last_word": [{"question": before, "answer": word} for before, word in words],
        "documents": [{"question": "", "answer": text[:1500]} for text in sorted(texts, key=len)[-12:]],
        "writing": [{"question": ". ".join(parts[:2]) + ".", "answer": parts[2]} for parts in reported[:20]],
    }
    for name, (kind, metric, more) in TASKS.items():
        lines = "".join(json.dumps(each) + "\n" for each in sets[name])
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        (folder / f"{name}.yaml").write_text(
            TASK.format(name=name, kind=kind, metric=metric, more=more), encoding="utf-8"
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, a checkpoint, its export, prompts and task sets."""
    folder = tmp_path_factory.mktemp("exported")
    texts = documentation()
    tokenizer = train_byte_level_bpe(iter(texts), 1000)
    tokenizer.save(str(folder / "tokenizer.json"))
    with DatasetWriter(folder / "text", numpy.dtype(numpy.uint16)) as writer:
        for text in texts:
            writer.add_document(numpy.array([*tokenizer.encode(text).ids, 0], numpy.uint16))
    run(1, folder, **settings(folder), data_path=str(folder / "text"), save=str(folder / "save"), train_iters=200)
    arguments = ["--input-dir", str(folder / "save"), "--output-dir", str(folder / "hf")]
    assert convert_to_hf.main(arguments) == 0
    prompts = [text[: 20 + 4 * number].strip() for number, text in enumerate(texts[:PROMPTS])]
    assert len(set(prompts)) == PROMPTS
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    write_tasks(folder, texts)
    return folder


def settings(folder: Path) -> dict[str, Any]:
    return {
        **{key: value for key, value in BASE.items() if key != "train_iters"},
        "seq_length": SEQUENCE,
        "max_position_embeddings": SEQUENCE,
        "tokenizer_type": "HFTokenizer",
        "vocab_file": str(folder / "tokenizer.json"),
        "checkpoint_factor": 1000,
        "eval_iters": 0,
        "optimizer": {"type": "Adam", "params": {"lr": 3e-3}},
    }


def ask_rank(rank: int, world_size: int, folder: str, given: dict[str, Any]) -> dict[str, Any]:
    """What one worker of generate.py and of evaluate.py does, in several manners, in one process group."""
    os.chdir(folder)
    inference_run.shutdown = lambda: None
    found: dict[str, Any] = {}
    config = resolve([], given, Resources(world_size)).config
    for manner, how in MANNERS.items():
        generate(config.replace(**how, sample_output_file=f"{manner}.jsonl"))
    for name, how in EVALUATIONS.items():
        evaluation_run._publish = lambda _config, results, name=name: found.update({name: answers(results)})
        evaluation_run.evaluate(config.replace(**how))
    return found


def ask(trained: Path, folder: Path, layout: str, load: str) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """(the texts of each manner, the answers to each task of each batch size) of this project."""
    world_size, others = LAYOUTS[layout]
    folder.mkdir(exist_ok=True)
    for file in (*trained.glob("*.jsonl"), *trained.glob("*.yaml"), trained / "prompts.txt"):
        (folder / file.name).write_bytes(file.read_bytes())
    given = {
        **settings(trained),
        **others,
        "train_batch_size": 8,
        "train_iters": 1,
        "load": str(trained / load),
        "log_dir": str(folder / "logs"),
        "sample_input_file": "prompts.txt",
        "maximum_tokens": NEW,
        "eval_tasks": list(TASKS),
        "eval_include_path": ".",
    }
    scores, *_ = run_distributed(ask_rank, world_size, str(folder), given, timeout=280)
    texts = {}
    for manner in MANNERS:
        lines = (folder / f"{manner}.jsonl").read_text(encoding="utf-8").splitlines()
        texts[manner] = [json.loads(line)["text"] for line in lines]
    return texts, scores


def answers(results: dict[str, Any]) -> dict[str, list[Any]]:
    """Of each task what the model answered to each document, in order."""
    return {
        name: [sample["filtered_resps"] for sample in sorted(samples, key=lambda each: each["doc_id"])]
        for name, samples in results["samples"].items()
    }


@pytest.fixture(scope="module")
def transformers_texts(trained: Path) -> list[str]:
    """What transformers.generate makes of the prompts, one at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(trained / "hf", dtype=torch.float32).eval()
    tokenizer = make_tokenizer("HFTokenizer", vocab_file=str(trained / "tokenizer.json"))
    texts = []
    for prompt in (trained / "prompts.txt").read_text(encoding="utf-8").splitlines():
        tokens = torch.tensor([tokenizer.encode(prompt)])
        made = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=tokenizer.eod,
            pad_token_id=tokenizer.eod,
        )
        new = made[0, tokens.shape[1] :].tolist()
        texts.append(tokenizer.decode(new[: new.index(tokenizer.eod)] if tokenizer.eod in new else new))
    return texts


@pytest.fixture(scope="module")
def harness_answers(trained: Path) -> dict[str, dict[str, list[Any]]]:
    """What lm-eval's own model answers in its own runner, without examples and with two."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(trained / "hf"), device="cpu", dtype="float32", batch_size=4)
    before = Path.cwd()
    os.chdir(trained)
    try:
        manager = TaskManager(include_path=".", include_defaults=False)
        plain = simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
        shown = simple_evaluate(model, tasks=["last_word"], num_fewshot=2, task_manager=manager, bootstrap_iters=0)
        return {"batch 1": answers(plain), "batch 8": answers(plain), "two examples": answers(shown)}
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    ("layout", "load"),
    [*((layout, "save") for layout in LAYOUTS), ("one process", "hf")],
    ids=[*LAYOUTS, "their folder"],
)
def test_texts_and_scores_are_theirs(
    layout: str,
    load: str,
    trained: Path,
    transformers_texts: list[str],
    harness_answers: dict[str, dict[str, list[Any]]],
    tmp_path: Path,
) -> None:
    """Scores to 1e-4 nats a document; a rolling sum over hundreds of tokens to 1e-6 of itself where that is more."""
    texts, scores = ask(trained, tmp_path / "run", layout, load)
    assert len(set(transformers_texts)) > 10, "the model says something of its own to many prompts"
    for manner in MANNERS:
        assert texts[manner] == transformers_texts, manner
    assert scores.keys() == harness_answers.keys() == EVALUATIONS.keys()
    assert harness_answers["two examples"]["last_word"] != harness_answers["batch 1"]["last_word"]
    for manner, found in scores.items():
        for name, expected in harness_answers[manner].items():
            assert len(found[name]) == len(expected) >= 12
            for ours, theirs in zip(found[name], expected, strict=True):
                assert_same(ours, theirs)


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal texts and flags; numbers as the test says."""
    if isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-6)
    else:
        assert ours == theirs
