"""Run by test_megatron_core.py in a process that knows only Megatron-Core's `megatron`: `SCRIPT COMMAND FOLDER`.

read: every document of FOLDER/ours -> FOLDER/read.npz. write: FOLDER/documents.npz -> FOLDER/theirs.bin and .idx.
index: FOLDER/index_input.npz -> the compiled helper's sample index and blend in FOLDER/index_output.npz.
"""

import sys
from pathlib import Path

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


if __name__ == "__main__":
    {"read": read, "write": write, "index": index}[sys.argv[1]](Path(sys.argv[2]))
