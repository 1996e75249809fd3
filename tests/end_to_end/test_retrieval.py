"""Encoders of queries and passages: each layout trains as one process does, runs learn, and resume bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.checkpoint.format.weight_shards import WeightFiles
from megatron.config import Resources, resolve
from megatron.data.indexed.writer import DatasetWriter
from megatron.inference import runner as inference_runner
from megatron.retrieval import embedding_file
from megatron.retrieval.runner import embed_passages, search_passages
from tests.end_to_end.runs import BASE, run_all, series
from tests.multi_rank import RankFailedError, run_distributed

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{number}" for number in range(40)]
TOPICS = 12
EXACT = ("train/lm_loss", "train/grad_norm", "train/top1_accuracy", "train/average_rank", "validation/lm_loss")
SIZES: dict[str, Any] = {"num_layers": 2, "pos_emb": "learned", "norm": "layernorm", "activation": "gelu"}
SIZES |= {"no_weight_tying": False, "num_kv_heads": 4, "seq_length": 24, "max_position_embeddings": 24}
SIZES |= {"hidden_size": 32, "init_method_std": 0.1, "eval_interval": 3, "train_iters": 6, "eval_iters": 1}
SIZES |= {"tokenizer_type": "BertWordPieceLowerCase", "retrieval_projection_size": 16, "split": "8,2,0"}
SEARCHED: dict[str, dict[str, Any]] = {"data": {}, "tensor": {"model_parallel_size": 2}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "ZeRO 1": {"zero_optimization": {"stage": 1}},
    "ZeRO 2": {"zero_optimization": {"stage": 2}},
    "ZeRO 3": {"zero_optimization": {"stage": 3}},
}


def words(generator: np.random.Generator, topic: int, count: int) -> list[str]:
    """Words of a topic and of none."""
    own = [f"t{topic}x{number}" for number in generator.integers(3, size=2)]
    return [*generator.choice(WORDS, count), *own]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Configurations of both objectives."""
    folder, generator = tmp_path_factory.mktemp("retrieval"), np.random.default_rng(1)
    pieces = [*SPECIAL, *WORDS, *(f"t{topic}x{number}" for topic in range(TOPICS) for number in range(3))]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    ids = {piece: number for number, piece in enumerate(pieces)}
    kind = np.dtype("<u2")
    with DatasetWriter(folder / "text", kind) as text, DatasetWriter(folder / "title", kind) as title:
        for number in range(60):
            topic = number % TOPICS
            sentences = [[ids[word] for word in words(generator, topic, 3)] for _ in range(generator.integers(2, 9))]
            sizes = np.array([len(one) for one in sentences])
            text.add_documents(np.concatenate(sentences), sizes, np.array([len(sentences)]))
            title.add_document(np.array([ids[f"t{topic}x0"]]))

    def passage(topic: int) -> dict[str, str]:
        return {"title": f"t{topic}x1", "text": " ".join(words(generator, topic, 6))}

    for name, count in (("train", 360), ("dev", 18)):
        rows = []
        for number in range(count):
            topic = number % TOPICS
            wrong = [passage((topic + step) % TOPICS) for step in (1, 2, 3)]
            question = f"t{topic}x2 {' '.join(generator.choice(WORDS, 3))}?"
            row = {"question": question, "positive_ctxs": [passage(topic)]}
            rows.append({**row, "hard_negative_ctxs": wrong[: number % 3], "negative_ctxs": wrong[2:]})
        (folder / f"{name}.json").write_text(json.dumps(rows))
    common = {**SIZES, "vocab_file": str(folder / "vocab.txt")}
    tuned = {"train_impl": "dpr", "task_train_data": [str(folder / "train.json")], "retrieval_valid_hard_negatives": 2}
    tuned |= {"task_valid_data": [str(folder / "dev.json")], "retrieval_valid_other_negatives": 1}
    return {
        "ict": common
        | {"train_impl": "ict", "data_path": str(folder / "text"), "titles_data_path": str(folder / "title")},
        "dpr": {**{name: value for name, value in common.items() if name != "split"}, **tuned},
    }


def test_layouts_train_as_one_process_does(keys: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Also tensor parallelism, one encoder for both, scaled scores, and micro batches that do not see each other."""
    tensor = {"model_parallel_size": 2, "train_micro_batch_size_per_gpu": 8}
    cases = {(kind, name): {**keys[kind], **layout} for kind in keys for name, layout in LAYOUTS.items()}
    cases |= {("dpr", "tensor"): {**keys["dpr"], **tensor}}
    shared = {"retrieval_shared_encoder": True, "retrieval_projection_size": None, "retrieval_score_scaling": True}
    cases |= {("shared", "tensor, sequence"): {**keys["ict"], **tensor, **shared, "sequence_parallel": True}}
    cases |= {("shared", "data"): {**keys["ict"], **shared}}
    alone = run_all(1, tmp_path / "one", {**keys, "shared": {**keys["ict"], **shared}})
    for (kind, name), found in run_all(2, tmp_path / "two", cases).items():
        pool = ("validation/pool_average_rank",) if kind == "dpr" else ()
        for metric in EXACT + pool:
            if "validation/lm" in metric and kind == "dpr":
                continue  # a rank with the last rows has padding, which is no passage
            expected = series(alone[kind], metric)
            assert len(expected) == (6 if "train" in metric else 2), metric
            assert series(found, metric) == pytest.approx(expected, rel=1e-4 if "norm" in metric else 1e-5), (
                kind,
                name,
                metric,
            )


def test_it_learns_from_an_encoder_and_goes_on_bit_by_bit(keys: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """ICT starts from BERT, DPR from ICT; both encoders begin with the same weights."""
    made = {"lr_decay_style": "constant", "warmup": 0.0, "optimizer": {"type": "Adam", "params": {"lr": 3.0e-3}}}
    bert = {**keys["ict"], "train_impl": "bert", "pack_impl": "unpacked", "bert_binary_head": False}
    bert |= {"num_token_types": 2, "titles_data_path": None, "retrieval_projection_size": None, "train_iters": 2}
    run_all(1, tmp_path, {"bert": {**bert, "save": str(tmp_path / "bert"), "checkpoint_factor": 2}})
    ict = {**keys["ict"], **made, "pretrained_checkpoint": str(tmp_path / "bert"), "hidden_dropout": 0.1}
    ict |= {"train_iters": 40, "eval_interval": 20, "train_batch_size": 16}
    saved = {"save": str(tmp_path / "ict"), "load": str(tmp_path / "ict"), "checkpoint_factor": 15}
    start = {**ict, "train_iters": 0, "save": str(tmp_path / "start"), "extra_save_iters": [0]}
    cases = {"start": start, "full": ict, "first": {**ict, **saved, "exit_interval": 15}, "rest": {**ict, **saved}}
    runs = run_all(1, tmp_path, cases)
    for metric in ("train/lm_loss", "train/average_rank", "validation/lm_loss"):
        both = series(runs["first"], metric) + series(runs["rest"], metric)
        assert both == series(runs["full"], metric) != [], metric
    first, begun = (WeightFiles.open(tmp_path / name) for name in ("bert/global_step2", "start/global_step0"))
    encoder = {key for key in sorted(first.keys()) if not key.startswith("6.")}
    for key in encoder:
        layer, _, name = key.partition(".")
        for tower in (key, f"{int(layer) + 7}.{name}"):
            assert torch.equal(begun.shards(tower)[0], first.shards(key)[0])
    heads = {f"{layer}.projection.{kind}" for layer in (6, 13) for kind in ("weight", "bias")}
    second = {f"{int(key.split('.')[0]) + 7}.{key.split('.', 1)[1]}" for key in encoder}
    assert begun.keys() == encoder | second | heads

    dpr = {**keys["dpr"], **made, "pretrained_checkpoint": str(tmp_path / "ict"), "train_batch_size": 24}
    dpr |= {"train_iters": None, "train_epochs": 8, "retrieval_report_topk_accuracies": [1, 5]}
    found = run_all(1, tmp_path, {"dpr": dpr})["dpr"]
    ranks = series(found, "validation/pool_average_rank")
    assert len(ranks) == 8
    assert ranks[-1] < 4.0 < ranks[0]
    assert series(found, "validation/pool_top5_accuracy")[-1] > 0.8


def search_rank(rank: int, world_size: int, block: int, calls: list[tuple[str, dict[str, Any]]]) -> None:
    """Embeds and searches, one call after the other. block: passages that are marked together."""
    inference_runner.shutdown = lambda: None
    embedding_file.BLOCK = block
    for script, settings in calls:
        config = resolve([], {**BASE, **settings, "user_script": script}, Resources(world_size)).config
        (embed_passages if script == "embed_passages.py" else search_passages)(config)


def test_a_corpus_is_embedded_and_searched(keys: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """On one rank and several; what is missing is embedded alone, and answers are in the first passages."""
    model = {**keys["dpr"], "lr_decay_style": "constant", "warmup": 0.0, "save": str(tmp_path / "dpr")}
    model |= {"optimizer": {"type": "Adam", "params": {"lr": 3.0e-3}}, "train_batch_size": 24, "train_iters": 120}
    run_all(1, tmp_path, {"dpr": {**model, "checkpoint_factor": 120, "eval_interval": 120}})
    generator = np.random.default_rng(3)
    rows = [(number % TOPICS, " ".join(words(generator, number % TOPICS, 6))) for number in range(70)]
    lines = [f"p{number}\t{text}\tt{topic}x1" for number, (topic, text) in enumerate(rows)]
    (tmp_path / "corpus.tsv").write_text("\n".join(["id\ttext\ttitle", *lines]))
    asked = [(topic, f"t{topic}x2 {' '.join(generator.choice(WORDS, 3))}?") for topic in range(TOPICS)]
    answers = [[f"t{topic}x{number}" for number in range(3)] for topic, _ in asked]
    lines = [f"{text}\t{answer}" for (_, text), answer in zip(asked, answers, strict=True)]
    (tmp_path / "questions.tsv").write_text("\n".join(lines))
    common = {**keys["dpr"], "load": str(tmp_path / "dpr"), "evidence_data_path": str(tmp_path / "corpus.tsv")}
    common |= {"qa_data": [str(tmp_path / "questions.tsv")], "retrieval_report_topk_accuracies": [1, 5, 20]}

    def calls(name: str, **layout: Any) -> list[tuple[str, dict[str, Any]]]:
        settings = {
            **common,
            **layout,
            "embedding_path": str(tmp_path / name),
            "log_dir": str(tmp_path / f"logs {name}"),
        }
        return [("embed_passages.py", settings), ("search_passages.py", settings)]

    run_distributed(search_rank, 1, 1024, calls("one", eval_batch_size=7))
    vectors = np.load(tmp_path / "one" / "vectors.npy")
    record = json.loads((tmp_path / "logs one" / "retrieval.json").read_text())[str(tmp_path / "questions.tsv")]
    found = [json.loads(line) for line in (tmp_path / "logs one" / "passages.jsonl").read_text().splitlines()]
    has = [
        [bool({*rows[int(one["id"][1:])][1].split()} & {*own["answers"]}) for one in own["passages"]] for own in found
    ]
    assert [[one["has_answer"] for one in own["passages"]] for own in found] == has
    assert record == {
        "questions": TOPICS,
        **{f"top{top}_recall": pytest.approx(np.mean([any(own[:top]) for own in has])) for top in (1, 5, 20)},
    }
    assert record["top5_recall"] > 0.9

    twice = [call for name, layout in SEARCHED.items() for call in calls(name, **layout)]
    run_distributed(search_rank, 2, 16, twice)
    for name in SEARCHED:
        np.testing.assert_allclose(np.load(tmp_path / name / "vectors.npy"), vectors, atol=1e-5)
        assert (tmp_path / f"logs {name}" / "passages.jsonl").exists()
        other = json.loads((tmp_path / f"logs {name}" / "retrieval.json").read_text())
        assert other[str(tmp_path / "questions.tsv")] == record
    indexed = {
        name: {**calls("data", retrieval_index=name)[1][1], "log_dir": str(tmp_path / name)} for name in ("flat", "ivf")
    }
    run_distributed(search_rank, 2, 16, [("search_passages.py", settings) for settings in indexed.values()])
    for name in indexed:  # ivf has one cell, so it compares with all
        other = json.loads((tmp_path / name / "retrieval.json").read_text())[str(tmp_path / "questions.tsv")]
        assert other == {**record, **({"index_recall": 1.0} if name == "ivf" else {})}

    done, stored = (np.load(tmp_path / "data" / name, mmap_mode="r+") for name in ("done.npy", "vectors.npy"))
    before = stored.copy()
    done[2], stored[32:48], stored[0] = 0, 7.0, 9.0  # the second is missing, the first is not looked at
    done.flush(), stored.flush()
    with pytest.raises(RankFailedError, match="1 blocks of its embeddings are missing"):
        run_distributed(search_rank, 1, 16, calls("data")[1:])
    run_distributed(search_rank, 1, 16, calls("data")[:1])
    again = np.load(tmp_path / "data" / "vectors.npy")
    np.testing.assert_allclose(again[1:], before[1:], atol=1e-5)
    assert (again[0] == 9.0).all()
