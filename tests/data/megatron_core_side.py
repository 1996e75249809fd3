"""Run by test_megatron_core.py in a process that knows only Megatron-Core's `megatron`: `SCRIPT COMMAND FOLDER`.

read: every document of FOLDER/ours -> FOLDER/read.npz. write: FOLDER/documents.npz -> FOLDER/theirs.bin and .idx.
index: FOLDER/index_input.npz -> the compiled helper's sample index and blend in FOLDER/index_output.npz.
masked: FOLDER/given.json and the data set FOLDER/masked -> rows and masked samples in FOLDER/masked_output.npz.
blocks: FOLDER/given.json and the data sets FOLDER/text and FOLDER/title -> rows of blocks in FOLDER/blocks_output.npz.
spans: FOLDER/given.json and the data set FOLDER/spans -> rows and samples of T5 in FOLDER/spans_output.npz.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

# A checkout on the path has a package of the same name, which would come first.
sys.path[:] = [position for position in sys.path if not (Path(position) / "megatron" / "__init__.py").exists()]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]

from megatron.core.datasets import helpers  # noqa: E402
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder  # noqa: E402


def read(folder):
    data = IndexedDataset(str(folder / "ours"))
    documents = {f"d{item}": np.asarray(data[item]) for item in range(len(data))}
    np.savez(
        folder / "read.npz",
        lengths=data.sequence_lengths,
        document_indices=data.document_indices,
        dtype=np.dtype(data.index.dtype).name,
        **documents,
    )


def write(folder):
    given = np.load(folder / "documents.npz")
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=DType.optimal_dtype(int(given["vocabulary"])))
    for name in sorted(given.files):
        if name.startswith("d"):
            tokens = torch.from_numpy(given[name].astype(np.int64))
            builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(folder / "theirs.idx"))


def index(folder):
    given = np.load(folder / "index_input.npz")
    samples = helpers.build_sample_idx(
        given["sizes"],
        given["documents"],
        int(given["seq_length"]),
        int(given["epochs"]),
        int(given["tokens_per_epoch"]),
    )
    weights, count = given["weights"], int(given["blend_samples"])
    sets = np.zeros(count, np.int16)
    numbers = np.zeros(count, np.int64)
    helpers.build_blending_indices(sets, numbers, weights, len(weights), count, False)
    np.savez(folder / "index_output.npz", samples=samples, sets=sets, numbers=numbers)


def masked(folder):
    from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset

    given = json.loads((folder / "given.json").read_text())
    data = IndexedDataset(str(folder / "masked"))
    length, order, seed = given["seq_length"], given["sentence_order"], given["seed"]
    samples = object.__new__(BERTMaskedWordPieceDataset)  # its constructor asks for process groups
    names = {number: ("##" if number >= given["first_piece"] else "") + str(number) for number in range(given["ids"])}
    samples.config = SimpleNamespace(
        sequence_length=length,
        random_seed=seed,
        classification_head=order,
        tokenizer=SimpleNamespace(cls=given["cls"], sep=given["sep"], mask=given["mask"], pad=0, inv_vocab=names),
        masking_probability=0.15,
        masking_max_ngram=3,
        masking_do_full_word=True,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=False,
        masking_do_permutation=False,
    )
    samples.dataset, samples.token_lookup, samples._pad_token_id = data, list(names), 0
    samples.sample_index = helpers.build_mapping(
        data.document_indices, data.sequence_lengths, 2**31 - 2, given["samples"], length - 3, 0.3, seed, False,
        2 if order else 1,
    )  # fmt: skip
    made = [samples[number] for number in range(len(samples.sample_index))]
    arrays = {name: np.stack([np.asarray(each[name]) for each in made]) for name in made[0]}
    np.savez(folder / "masked_output.npz", rows=samples.sample_index, **arrays)


def blocks(folder):
    given = json.loads((folder / "given.json").read_text())
    text, title = (IndexedDataset(str(folder / name)) for name in ("text", "title"))
    rows = [
        helpers.build_blocks_mapping(
            text.document_indices, text.sequence_lengths, title.sequence_lengths, 2**31 - 2, given["samples"],
            given["length"] - 3, given["seed"], False, one,
        )
        for one in (False, True)
    ]  # fmt: skip
    np.savez(folder / "blocks_output.npz", two=rows[0], one=rows[1])


def spans(folder):
    from collections import namedtuple

    from megatron.core.datasets.t5_dataset import T5MaskedWordPieceDataset

    given = json.loads((folder / "given.json").read_text())
    data = IndexedDataset(str(folder / "spans"))
    names = {number: ("##" if number >= given["first_piece"] else "") + str(number) for number in range(given["ids"])}
    tokenizer = {"bos": given["start"], "eos": given["end"], "cls": -1, "sep": -1, "mask": -1, "pad": 0}
    tokenizer |= {"inv_vocab": names, "additional_special_tokens_ids": given["sentinels"]}
    samples = object.__new__(T5MaskedWordPieceDataset)  # its constructor asks for process groups
    samples.config = SimpleNamespace(
        sequence_length=given["source"],
        sequence_length_encoder=given["source"],
        sequence_length_decoder=given["target"],
        random_seed=given["seed"],
        tokenizer=namedtuple("Tokenizer", tokenizer)(**tokenizer),
        masking_probability=0.15,
        masking_max_ngram=10,
        masking_do_full_word=True,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=True,
        masking_do_permutation=False,
    )
    samples.dataset, samples.token_lookup, samples._pad_token_id = data, list(names), 0
    samples.sample_index = helpers.build_mapping(
        data.document_indices, data.sequence_lengths, 2**31 - 2, given["samples"], given["source"] - 2, 0.3,
        given["seed"], False, 1,
    )  # fmt: skip
    made = [samples[number] for number in range(len(samples.sample_index))]
    arrays = {name: np.stack([np.asarray(each[name]) for each in made]) for name in made[0]}
    np.savez(folder / "spans_output.npz", rows=samples.sample_index, **arrays)


if __name__ == "__main__":
    commands = {"read": read, "write": write, "index": index, "masked": masked, "blocks": blocks, "spans": spans}
    commands[sys.argv[1]](Path(sys.argv[2]))
