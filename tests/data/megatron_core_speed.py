"""Run by benchmarks/sampling.py in a process that knows only Megatron-Core's `megatron`: `SCRIPT FOLDER`.

Reads FOLDER/settings.json. Prints one JSON object: the samples a second of its GPTDataset, in process and through a
loader with one worker, and the seconds of its compiled helpers.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

# A checkout on the path has a package of the same name, which would come first.
sys.path[:] = [position for position in sys.path if not (Path(position) / "megatron" / "__init__.py").exists()]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]

from megatron.core.datasets import helpers  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402


class Tokenizer:
    """What GPTDataset asks a tokenizer for."""

    vocab_size, eod, pad = 50_257, 0, -1

    def __init__(self):
        self.unique_identifiers = {"class": "none"}


def dataset(settings):
    """Their data set over the same files, documents and sequence length."""
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=settings["seq_length"],
        blend=([settings["prefix"]], None),
        split="1,0,0",
        path_to_cache=settings["cache"],
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [settings["samples"], 0, 0], lambda: True, config).build()[0]


def best(function, repeats):
    """The least of some wall times [s]."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def main(folder):
    """Measures and prints."""
    settings = json.loads((folder / "settings.json").read_text())
    data, count, repeats = dataset(settings), settings["samples"], settings["repeats"]
    order = np.random.default_rng(0).permutation(len(data))[:count].tolist()

    def read():
        for number in order:
            data[number]

    def load():
        few = torch.utils.data.Subset(data, order[: settings["loaded"]])
        for _ in torch.utils.data.DataLoader(few, batch_size=settings["micro_batch"], num_workers=1, drop_last=True):
            pass

    documents = np.load(folder / "documents.npz")
    sizes, epoch, total = documents["sizes"], documents["order"], int(documents["sizes"].sum(dtype=np.int64))
    weights, blended = np.array(settings["weights"]), settings["blended"]
    sets, numbers = np.zeros(blended, np.int16), np.zeros(blended, np.int64)
    print(
        json.dumps(
            {
                "in process": len(order) / best(read, repeats),
                "one worker": settings["loaded"] / best(load, repeats),
                "sample index": best(
                    lambda: helpers.build_sample_idx(sizes, epoch, settings["seq_length"], 1, total), repeats
                ),
                "blend": best(
                    lambda: helpers.build_blending_indices(sets, numbers, weights, len(weights), blended, False),
                    repeats,
                ),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
