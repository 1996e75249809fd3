"""The database of a run with retrieval, from the run's configuration: the wiring, in order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.checkpoint.save.saver import Counters
from megatron.config import Config
from megatron.config.validation.unknown_values import require
from megatron.data.dataset.sources import DataSource, read_splits
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.retro.neighbors import NeighborFile
from megatron.distributed.process_group import barrier
from megatron.engine.builder import init_topology
from megatron.param_table import RetroDims
from megatron.retrieval.faiss_index import KEY as FAISS_KEY
from megatron.retrieval.faiss_index import require_faiss
from megatron.retrieval.main_rank import on_main_rank
from megatron.retrieval.retro_database import RetroBuilder, file_of
from megatron.retrieval.text_embedder import TextEmbedder
from megatron.tokenizers import build_tokenizer
from megatron.training.data_setup import build_run_data, num_samples, run_tokenizer, train_iters, with_length

BATCH = 64
"""Texts of one pass where no batch size is given."""


def build_retro_database(config: Config) -> None:
    """Writes chunks, embeddings and neighbours to `retro_project_dir`. Collective over all ranks.

    Raises ConfigError where the folder has those of another run, or the encoder cannot be read; RunError where a file
    cannot be read or written.
    """
    require_faiss(config.retrieval.retrieval_index)
    topology = init_topology(config)
    tokenizer = build_tokenizer(config.tokenizer)
    sizes = RetroDims.of(config.model)
    assert sizes is not None
    plain = with_length(config.replace(retro_add_retriever=False), Counters(), tokenizer)
    data = build_run_data(plain, topology, tokenizer)
    counts = num_samples(plain.training, train_iters(plain), Counters(), same_valid=plain.data.valid_same_samples)
    loaders = {"train": data.train, "valid": data.valid, "test": data.test}
    splits, _ = read_splits(plain.data, {"train": 1})
    embedder = TextEmbedder(Path(require(config.retrieval.retro_embedder)))
    builder = RetroBuilder(
        folder=Path(require(config.retrieval.retro_project_dir)),
        sources=_each_file_once(splits[0].sources),
        splits={name: (loader.samples, counts[name]) for name, loader in loaders.items() if loader is not None},
        sizes=sizes,
        saved=config.retrieval.retro_query_num_neighbors_save,
        tokenizer=(tokenizer.decode, tokenizer.eod, run_tokenizer(plain, tokenizer).fingerprint or ""),
        embedder=embedder,
        batch=config.evaluation.eval_batch_size or BATCH,
        index=(config.retrieval.retrieval_index, config.retrieval.retrieval_ivf_probes),
    )
    on_main_rank(builder.create, folder=builder.folder, key="retro_project_dir")
    barrier()
    builder.embed()
    barrier()
    on_main_rank(builder.build_index, folder=builder.folder, key=FAISS_KEY)
    builder.search()
    barrier()
    if topology.rank == 0:
        stored = {split: NeighborFile(builder.folder, split, writes=False) for split in builder.splits}
        shapes = ", ".join(f"{split} {' x '.join(map(str, each.rows.shape))}" for split, each in stored.items())
        print(f"neighbours in {builder.folder}: {shapes} (samples x chunks x neighbours)", flush=True)


def _each_file_once(sources: Sequence[DataSource]) -> list[tuple[IndexedDataset, range]]:
    """Returns the token files of a split, one that a blend names twice once, each with its documents."""
    found: dict[str, tuple[IndexedDataset, range]] = {}
    for source in sources:
        found.setdefault(file_of(source.dataset), (source.dataset, source.documents))
    return list(found.values())
