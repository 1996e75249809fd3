"""Embedding a corpus and searching it, from a checkpoint: the wiring, in order.

Files are read before the model is loaded. Copies of the model share the work out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from megatron.atomic import atomic_path
from megatron.config import Config
from megatron.config.validation.unknown_values import require
from megatron.data.retrieval.answers import OpenQuestion, matcher, read_open_questions
from megatron.data.retrieval.evidence import Evidence
from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import barrier
from megatron.engine.engine import Engine
from megatron.engine.inference_engine import InferenceEngine
from megatron.errors import ConfigError
from megatron.inference.runner import with_loaded_model
from megatron.log import get_logger
from megatron.retrieval import embedding_file
from megatron.retrieval.embedding_file import EmbeddingFile
from megatron.retrieval.encoder import TextEncoder
from megatron.retrieval.faiss_index import require_faiss
from megatron.retrieval.main_rank import on_main_rank
from megatron.retrieval.passage_finder import PassageFinder
from megatron.tokenizer_info import describe_tokenizer
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.masking import class_tokens
from megatron.tokenizers.vocab_limit import full_tokenizer

QUERIES, PASSAGES = 0, 1
BATCH = 32
"""Texts of one pass where no batch size is given."""


def embed_passages(config: Config) -> None:
    """Writes the embeddings of `evidence_data_path` to `embedding_path`. Collective over all ranks.

    What the folder already has is not computed again. Raises ConfigError where it has embeddings of other passages, or
    by another model or tokenizer, and RunError where a file cannot be read or written.
    """
    config = config.for_inference()
    evidence, folder = _evidence(config), Path(require(config.retrieval.embedding_path))

    def work(engine: Engine, tokenizer: Tokenizer, topology: Topology) -> None:
        encoder = _encoder(config, engine, tokenizer, PASSAGES)
        probe = _probe(encoder)
        facts = _facts(config, evidence, tokenizer, width=len(probe))
        on_main_rank(lambda: _create(folder, facts, probe), folder=folder, key=embedding_file.KEY)
        stored = EmbeddingFile(folder, writes=True)
        blocks = stored.missing[topology.data.rank :: topology.data.size]
        barrier()  # every rank has read what is missing before one writes
        for done, block in enumerate(blocks):
            rows = encoder.rows([_texts(evidence, number) for number in stored.numbers(block)])
            vectors = encoder.embed_sorted(rows, _batch_size(config))
            if topology.model.is_first:
                stored.write(block, vectors.cpu().numpy())
            if topology.rank == 0 and (done + 1) % 10 == 0:
                get_logger(__name__).info("%d of %d blocks are embedded by this rank", done + 1, len(blocks))
        barrier()
        if topology.rank == 0:
            shape = f"{len(evidence):,} passages x {len(probe)}"
            print(f"{shape} in {folder}: {facts['dtype']}, {len(stored.missing)} blocks missing", flush=True)

    with_loaded_model(config, work)


def search_passages(config: Config) -> None:
    """Prints how often an answer of a question is in the first passages, and writes them. Collective over all ranks.

    `passages.jsonl` in the run directory has the passages of each question, `retrieval.json` the shares. Raises
    ConfigError where embeddings are of another corpus, tokenizer or model, or not complete, or the index is of others.
    """
    config = config.for_inference()
    section = config.retrieval
    require_faiss(section.retrieval_index)
    evidence = _evidence(config)
    folder = Path(require(section.embedding_path))
    files = {path: read_open_questions(Path(path)) for path in section.qa_data or ()}

    def work(engine: Engine, tokenizer: Tokenizer, topology: Topology) -> None:
        probe = _probe(_encoder(config, engine, tokenizer, PASSAGES))
        embedding_file.require_same(folder, _facts(config, evidence, tokenizer, width=len(probe)))
        _require_model(folder, probe)
        stored = EmbeddingFile(folder, writes=False)
        hint = "run tools/embed_passages.py with the same configuration again"
        stored.require_complete(folder, key=embedding_file.KEY, hint=hint)
        find = PassageFinder(section, folder, stored.rows, topology)
        encoder = _encoder(config, engine, tokenizer, QUERIES)
        tops = sorted(section.retrieval_report_topk_accuracies)
        record: dict[str, Any] = {}
        found: list[tuple[OpenQuestion, list[tuple[int, float, bool]]]] = []
        for path, questions in files.items():
            rows = encoder.rows([("", question.text) for question in questions])
            vectors = encoder.embed_sorted(rows, _batch_size(config))
            scores, numbers = find(vectors, tops[-1])
            recall = find.recall(vectors, numbers)
            if topology.rank == 0:
                own = _with_answers(questions, scores, numbers, evidence, section.retrieval_match)
                record[path] = {"questions": len(questions), **_shares(own, tops), **recall}
                found += own
        if topology.rank == 0:
            _report(config, record, partial(_write_passages, found=found, evidence=evidence))

    with_loaded_model(config, work)


def _evidence(config: Config) -> Evidence:
    return Evidence(Path(require(config.retrieval.evidence_data_path)))


def _texts(evidence: Evidence, number: int) -> tuple[str, str]:
    _, passage = evidence.passage(number)
    return passage.title, passage.text


def _batch_size(config: Config) -> int:
    return config.evaluation.eval_batch_size or config.training.train_micro_batch_size_per_gpu or BATCH


def _encoder(config: Config, engine: Engine, tokenizer: Tokenizer, tower: int) -> TextEncoder:
    assert isinstance(engine, InferenceEngine), engine
    return TextEncoder(
        engine,
        tokenizer,
        class_tokens(tokenizer),
        tower=tower,
        towers=1 if config.model.retrieval_shared_encoder else 2,
        seq_length=require(config.model.seq_length),
        types=bool(config.model.num_token_types),
    )


def _probe(encoder: TextEncoder) -> list[float]:
    """The embedding of an empty passage, which says whether a model is the same."""
    return [float(value) for value in encoder.embed(encoder.rows([("", "")]))[0]]


def _facts(config: Config, evidence: Evidence, tokenizer: Tokenizer, *, width: int) -> dict[str, Any]:
    """What decides the embeddings, beside the model's weights."""
    info = describe_tokenizer(config.tokenizer.tokenizer_type, full_tokenizer(tokenizer))
    return {
        "passages": len(evidence),
        "width": width,
        "dtype": "float32" if config.precision.precision == "fp32" else "float16",
        "corpus": evidence.digest,
        "tokenizer": info.fingerprint,
        "seq_length": config.model.seq_length,
    }


def _create(folder: Path, facts: Mapping[str, Any], probe: Sequence[float]) -> None:
    if (folder / embedding_file.HEADER).exists():
        embedding_file.require_same(folder, facts)
        _require_model(folder, probe)
    else:
        embedding_file.create(folder, {**facts, "probe": list(probe)})


def _require_model(folder: Path, probe: Sequence[float]) -> None:
    """Raises ConfigError where the embeddings of a folder are those of another model."""
    if not embedding_file.is_same(embedding_file.header(folder)["probe"], probe):
        hint = "load the checkpoint that they were made with, or name another folder"
        raise ConfigError.of(
            "its embeddings are those of another model", key=embedding_file.KEY, value=str(folder), hint=hint
        )


def _with_answers(
    questions: Sequence[OpenQuestion], scores: Tensor, numbers: Tensor, evidence: Evidence, match: str
) -> list[tuple[OpenQuestion, list[tuple[int, float, bool]]]]:
    """Number, score and "has an answer" of the passages of each question, the best first."""
    found = []
    for question, own, values in zip(questions, numbers.tolist(), scores.tolist(), strict=True):
        has = matcher(question.answers, match)
        pairs = [(number, value) for number, value in zip(own, values, strict=True) if number >= 0]
        found.append((question, [(*pair, has(evidence.passage(pair[0])[1].text)) for pair in pairs]))
    return found


def _shares(
    found: Sequence[tuple[OpenQuestion, list[tuple[int, float, bool]]]], tops: Sequence[int]
) -> dict[str, float]:
    """The share of questions of which one of the first passages has an answer, for each number of passages."""
    firsts = torch.tensor([next((rank for rank, each in enumerate(own) if each[2]), tops[-1]) for _, own in found])
    return {f"top{top}_recall": float((firsts < top).double().mean()) for top in tops}


def _report(config: Config, record: dict[str, Any], write_passages: Callable[[TextIO], None]) -> None:
    for path, values in record.items():
        shares = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name != "questions")
        print(f"{path}: {values['questions']:,} questions  {shares}", flush=True)
    if config.observe.log_dir is None:
        return
    folder = Path(config.observe.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "passages.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        write_passages(file)
    with atomic_path(folder / "retrieval.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _write_passages(
    file: TextIO, *, found: Sequence[tuple[OpenQuestion, list[tuple[int, float, bool]]]], evidence: Evidence
) -> None:
    for question, own in found:
        passages = []
        for number, score, has_answer in own:
            name, passage = evidence.passage(number)
            passages.append({"id": name, "title": passage.title, "score": score, "has_answer": has_answer})
        row = {"question": question.text, "answers": list(question.answers), "passages": passages}
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
