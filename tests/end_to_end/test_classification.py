"""A classifier from task files: each layout trains as one process does; it learns, resumes and writes predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.checkpoint.format.weight_shards import WeightFiles
from megatron.data.indexed.writer import DatasetWriter
from tests.end_to_end.runs import run_all, series
from tests.multi_rank import RankFailedError

CLASSES = ("north", "south", "west")
FILLERS = [f"w{number}" for number in range(24)]
SIGNS = {name: [f"{name}{number}" for number in range(4)] for name in CLASSES}
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *FILLERS,
    *(word for words in SIGNS.values() for word in words),
]
KINDS = ("weight", "bias")
EXACT = ("train/lm_loss", "train/grad_norm", "validation/lm_loss", "validation/accuracy")
SIZES = {"pos_emb": "learned", "norm": "layernorm", "activation": "gelu", "no_weight_tying": False}
SIZES |= {"num_kv_heads": 4, "init_method_std": 0.1, "eval_interval": 3, "train_iters": 6}
SIZES |= {"seq_length": 24, "max_position_embeddings": 24, "hidden_size": 32}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor, sequence": {"model_parallel_size": 2, "sequence_parallel": True},
    "tensor, ZeRO 1": {"model_parallel_size": 2, "zero_optimization": {"stage": 1}},
    "pipeline": {"pipe_parallel_size": 2, "train_micro_batch_size_per_gpu": 2},
    "dualpipev": {"pipe_parallel_size": 2, "pipe_schedule": "dualpipev", "train_micro_batch_size_per_gpu": 2},
    "data": {},
    "data, ZeRO 3": {"zero_optimization": {"stage": 3}},
}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts in which two words tell the class; the first, or with choices the right answer, has its word."""
    generator, found = np.random.default_rng(seed), []
    for number in range(count):
        name = CLASSES[generator.integers(3)]
        words = list(generator.choice(FILLERS, generator.integers(4, 9))) + list(generator.choice(SIGNS[name], 2))
        generator.shuffle(words)
        found.append({"id": f"r{number}", "text": " ".join(words), "text_pair": "w1 w2", "label": name})
    return found


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("task")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    sets = {"train": rows(150, 0), "first": rows(21, 1), "second": rows(16, 2)}
    sets["bare"] = [{name: value for name, value in row.items() if name != "label"} for row in rows(5, 3)]
    questions = []
    for row in rows(60, 4):
        answers = [str(np.random.default_rng(len(questions)).choice(SIGNS[name])) for name in CLASSES]
        questions.append({**row, "choices": answers, "label": CLASSES.index(row["label"])})
    sets["questions"] = questions
    for name, found in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return {
        "train_impl": "classification",
        "task_train_data": [str(folder / "train.jsonl")],
        "task_valid_data": [str(folder / f"{name}.jsonl") for name in ("first", "second", "bare")],
        "task_labels": list(CLASSES),
        "tokenizer_type": "BertWordPieceLowerCase",
        "vocab_file": str(folder / "vocab.txt"),
    } | SIZES


def multiple_choice(task: dict[str, Any]) -> dict[str, Any]:
    file = [str(Path(task["vocab_file"]).with_name("questions.jsonl"))]
    return {**task, "task_train_data": file, "task_valid_data": file, "task_labels": None, "task_choices": 3}


def test_layouts_train_as_one_process_does(task: dict[str, Any], tmp_path: Path) -> None:
    kinds = {"classes": task, "answers": multiple_choice(task)}
    alone = run_all(1, tmp_path / "one", kinds)
    cases = {("classes", name): {**task, **layout} for name, layout in LAYOUTS.items()}
    cases |= {("answers", name): {**kinds["answers"], **LAYOUTS[name]} for name in ("data", "pipeline")}
    for (kind, name), found in run_all(2, tmp_path / "two", cases).items():
        for metric in EXACT:
            expected = series(alone[kind], metric)
            assert series(found, metric) == pytest.approx(expected, rel=1e-4 if "norm" in metric else 1e-5), (
                name,
                metric,
            )
            assert len(expected) == (6 if "train" in metric else 2)


def test_it_learns_from_an_encoder_and_goes_on_bit_by_bit(task: dict[str, Any], tmp_path: Path) -> None:
    """An encoder that learned masked words gives its weights; predictions and accuracies agree."""
    save, end = tmp_path / "save", {"train_iters": None, "train_epochs": 6, "train_batch_size": 16, "warmup": 0.0}
    made = {"lr_decay_style": "constant", "optimizer": {"type": "Adam", "params": {"lr": 3.0e-3}}}
    tuned = {**task, **end, **made, "pretrained_checkpoint": str(tmp_path / "encoder"), "hidden_dropout": 0.1}
    tuned |= {"task_predictions": str(tmp_path / "predictions")}
    saved = {"save": str(save), "load": str(save), "checkpoint_factor": 9}
    encoder = {name: value for name, value in task.items() if not name.startswith("task_")}
    encoder |= {"train_impl": "bert", "pack_impl": "unpacked", "bert_binary_head": False, "num_token_types": 2}
    encoder |= {
        "data_path": sentences(tmp_path, task["vocab_file"]),
        "split": "1,0,0",
        "save": str(tmp_path / "encoder"),
    }
    encoder |= {"train_iters": 2, "checkpoint_factor": 2}
    untrained = {**tuned, "train_epochs": None, "train_iters": 0, "save": str(tmp_path / "start"), "load": None}
    rest = {**tuned, **saved}
    cases = {"bert": encoder, "full": tuned, "first": {**rest, "exit_interval": 20}, "rest": rest}
    runs = run_all(1, tmp_path, {**cases, "untrained": {**untrained, "extra_save_iters": [0]}})
    weights = [
        WeightFiles.open(tmp_path / f"{name}/global_step{step}") for name, step in (("encoder", 2), ("start", 0))
    ]
    shared = weights[0].keys() & weights[1].keys()
    assert weights[1].keys() - shared == {f"8.{name}.{kind}" for name in ("pooler", "classifier") for kind in KINDS}
    assert all(key.startswith("8.") for key in weights[0].keys() - shared)
    assert all(torch.equal(*(each.shards(key)[0] for each in weights)) for key in shared)
    assert len(series(runs["untrained"], "validation/accuracy")) == 1
    for name in EXACT:
        both = series(runs["first"], name) + series(runs["rest"], name)
        assert both == series(runs["full"], name) != [], name
    accuracies = series(runs["full"], "validation/accuracy")
    assert len(accuracies) == 6 and accuracies[-1] >= 0.95

    alone = {**task, "load": str(save), "finetune": True, "train_iters": 0, "train_batch_size": 16, "warmup": 0.0}
    assert series(run_all(1, tmp_path / "alone", {"only": alone})["only"], "validation/accuracy") == accuracies[-1:]

    turned = {"task_labels": list(CLASSES[::-1])}
    with pytest.raises(RankFailedError, match=r"task_labels = .*was trained with"):
        run_all(1, tmp_path / "order", {"one": {**rest, **turned}})
    other = {**untrained, **turned, "pretrained_checkpoint": str(save), "save": str(tmp_path / "b")}
    run_all(1, tmp_path / "next", {"one": {**other, "extra_save_iters": [0]}})
    both = [WeightFiles.open(folder) for folder in (save / "global_step54", tmp_path / "b/global_step0")]
    assert all(torch.equal(*(each.shards(key)[0] for each in both)) for key in (*shared, "8.pooler.weight"))
    assert not torch.equal(*(each.shards("8.classifier.weight")[0] for each in both))

    lines = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "predictions/iteration_54").iterdir()
    }
    assert [line["id"] for line in lines["bare"]] == [f"r{number}" for number in range(5)]
    assert "label" not in lines["bare"][0]
    labeled = {name: [line["prediction"] == line["label"] for line in lines[name]] for name in ("first", "second")}
    for name, right in labeled.items():
        assert np.mean(right) == pytest.approx(series(runs["full"], f"validation/accuracy/{name}")[-1])
        assert len(right) == {"first": 21, "second": 16}[name]
    together = np.concatenate([*labeled.values()])
    assert together.mean() == pytest.approx(accuracies[-1])
    expected = {row["id"]: row["label"] for row in rows(21, 1)}
    assert {line["id"]: line["label"] for line in lines["first"]} == expected
    unlabeled = {row["id"]: row["label"] for row in rows(5, 3)}
    assert np.mean([line["prediction"] == unlabeled[line["id"]] for line in lines["bare"]]) >= 0.8


def sentences(folder: Path, vocabulary: str) -> str:
    """Returns the prefix of token files of sentences for a masked language model."""
    with DatasetWriter(folder / "d", np.dtype("<i4")) as writer:
        for row in rows(40, 9):
            words = [VOCABULARY.index(word) for word in row["text"].split()]
            writer.add_document(np.array(words, np.int32))
    return str(folder / "d")


def test_predictions_that_cannot_be_written_are_refused_before_the_first_step(
    task: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        RankFailedError, match=r"task_predictions = .*predictions cannot be written there: Not a directory"
    ):
        run_all(1, tmp_path, {"one": {**task, "task_predictions": str(tmp_path / "file/predictions")}})


def test_the_average_of_the_weights_has_accuracies_and_one_token_type_reads_pairs(
    task: dict[str, Any], tmp_path: Path
) -> None:
    keys = {**task, "num_token_types": 1, "ema_decay": 0.5, "train_iters": 2, "eval_interval": 1}
    records = run_all(2, tmp_path, {"one": keys})["one"]
    both = [series(records, f"{split}/accuracy") for split in ("validation", "validation_ema")]
    assert [len(each) for each in both] == [2, 2]
    assert series(records, "validation_ema/accuracy/first") != []
