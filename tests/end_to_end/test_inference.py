"""From a trained checkpoint to texts, scores and bits per byte, through the real entry points, on any layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron.config import Resources, resolve
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import DatasetWriter
from megatron.evaluation.runner import evaluate, measure_perplexity, measure_text
from megatron.inference import runner as inference_run
from megatron.inference.runner import generate
from tests.end_to_end.runs import BASE, make_dataset, run
from tests.layouts import pick
from tests.multi_rank import RankFailedError, run_distributed

LAYOUTS = pick("one process", "tensor 2", "pipeline 2", "data 2", "tensor 2, pipeline 2")
TASK = """
task: small_cloze
dataset_path: json
dataset_kwargs:
  data_files: documents.jsonl
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and the files that the runs below read."""
    folder = tmp_path_factory.mktemp("trained")
    run(1, folder, data_path=make_dataset(folder), save=str(folder / "save"), train_iters=8, checkpoint_factor=100)
    (folder / "prompts.txt").write_text("def read(\nimport os\nclass Stack:\n", encoding="utf-8")
    (folder / "valid.txt").write_text(Path(__file__).read_text(encoding="utf-8")[:600], encoding="utf-8")
    documents = [
        {"question": f"def f{number}(", "choices": ["self)", "zqj%", "return"], "answer": number % 3}
        for number in range(9)
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents), encoding="utf-8")
    (folder / "cloze.yaml").write_text(TASK, encoding="utf-8")
    words = [{"text": f"return {number} if number else None"} for number in range(5)]
    (folder / "words.jsonl").write_text("".join(json.dumps(each) + "\n" for each in words), encoding="utf-8")
    with DatasetWriter(folder / "items", numpy.dtype(numpy.uint16)) as writer:
        for size in (20, 32, 90):
            writer.add_document(numpy.frombuffer(__doc__.encode()[:size], numpy.uint8).astype(numpy.uint16))
    return folder


def use_rank(rank: int, world_size: int, folder: str, settings: dict[str, Any]) -> None:
    """What one worker does, one entry point after another, in one process group."""
    os.chdir(folder)
    inference_run.shutdown = lambda: None
    config = resolve([], settings, Resources(world_size)).config
    generate(config.replace(sample_output_file="greedy.jsonl"))
    generate(config.replace(sample_output_file="sampled.jsonl", temperature=0.9, top_p=0.9, num_samples=2))
    generate(config.replace(text_gen_type="precompute", data_path="items", precompute_model_name="scored"))
    measure_text(config)
    measure_perplexity(config)
    evaluate(config)


def use(trained: Path, folder: Path, layout: str, **others: Any) -> dict[str, Any]:
    """What the entry points write on a layout."""
    world_size, settings = LAYOUTS[layout]
    folder.mkdir()
    files = ("documents.jsonl", "cloze.yaml", "prompts.txt", "valid.txt", "words.jsonl", "items.bin", "items.idx")
    for name in files:
        (folder / name).write_bytes((trained / name).read_bytes())
    expected = {
        "load": str(trained / "save"),
        "log_dir": str(folder),
        "sample_input_file": "prompts.txt",
        "maximum_tokens": 12,
        "eval_text": "valid.txt",
        "eval_cloze": "words.jsonl",
        "eval_tasks": ["small_cloze"],
        "eval_include_path": ".",
        "eval_batch_size": 4,
        "eval_results_prefix": "small",
    }
    run_distributed(use_rank, world_size, str(folder), {**BASE, **settings, **expected, **others}, timeout=200)
    (results,) = folder.glob("small_eval_results_*.json")
    written: dict[str, Any] = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("greedy", "sampled")
    }
    written["bits"] = json.loads((folder / "bits_per_byte.json").read_text())
    written["perplexity"] = json.loads((folder / "perplexity.json").read_text())
    written["scored"] = numpy.concatenate(list(IndexedDataset(str(folder / "items_scored"))))
    written["results"] = json.loads(results.read_text())
    return written


@pytest.fixture(scope="module")
def alone(trained: Path) -> dict[str, Any]:
    return use(trained, trained / "alone", "one process")


def texts(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(record["context"], record["text"]) for record in records]


def test_the_files_hold_what_was_asked_for(alone: dict[str, Any]) -> None:
    assert [context for context, _ in texts(alone["greedy"])] == ["def read(", "import os", "class Stack:"]
    assert [context for context, _ in texts(alone["sampled"])] == [
        each for context in ("def read(", "import os", "class Stack:") for each in (context, context)
    ]
    assert len(set(texts(alone["sampled"]))) == 6
    assert alone["bits"]["bytes"] == 600
    assert 0 < alone["bits"]["bits_per_byte"] < 9  # even 8 steps of training are worth something beyond a uniform guess
    assert len(alone["scored"]) == 20 + 32 + 90 and (alone["scored"] < 0).sum() == 20 + 32 + 90 - 3
    assert alone["perplexity"]["cloze_texts"] == 5 and alone["perplexity"]["words"] > 50
    assert alone["results"]["n-samples"]["small_cloze"]["effective"] == 9
    assert alone["results"]["config"]["model_args"]["num_layers"] == 4


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one process"])
def test_every_layout_says_the_same(layout: str, trained: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    found = use(trained, tmp_path / "run", layout)
    assert texts(found["greedy"]) == texts(alone["greedy"])
    assert texts(found["sampled"]) == texts(alone["sampled"])
    assert found["bits"]["bits_per_byte"] == pytest.approx(alone["bits"]["bits_per_byte"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-4)
    assert found["scored"] == pytest.approx(alone["scored"], abs=1e-4)
    assert found["results"]["results"] == alone["results"]["results"]


def test_recomputing_every_token_says_the_same(trained: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    found = use(trained, tmp_path / "run", "one process", recompute=True)
    assert texts(found["greedy"]) == texts(alone["greedy"])
    assert texts(found["sampled"]) == texts(alone["sampled"])


def test_without_a_checkpoint_nothing_is_made_up(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="load"):
        use(trained, tmp_path / "run", "one process", load=str(tmp_path / "nowhere"))
    assert not list((tmp_path / "run").glob("*.jsonl.partial")) and not (tmp_path / "run" / "greedy.jsonl").exists()
