"""Length and samples of a run that continues another one, whose batch size may have been different."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron.checkpoint.save.saver import Counters
from megatron.training.data_setup import num_samples, with_length
from tests.end_to_end.runs import BASE, make_dataset, run_rank
from tests.inference.small_model import small_config
from tests.multi_rank import RankFailedError, run_distributed

EIGHT = Counters(iteration=4, consumed_samples=32, consumed_tokens=0)
"""Four steps of 8 samples."""


@pytest.mark.parametrize(
    ("batch", "start", "expected"),
    [
        (8, Counters(), 80),
        (8, EIGHT, 80),
        (2, EIGHT, 32 + 6 * 2),
        (16, EIGHT, 32 + 6 * 16),
        (4, Counters(iteration=10, consumed_samples=80, consumed_tokens=0), 40),  # nothing is left to train
    ],
)
def test_samples_of_a_run_that_continues_with_another_batch_size(batch: int, start: Counters, expected: int) -> None:
    training = small_config(train_batch_size=batch, eval_interval=5, eval_iters=3).training
    assert num_samples(training, 10, start) == {"train": expected, "valid": 3 * 3 * batch, "test": 3 * batch}


@pytest.mark.parametrize(
    ("batch", "start", "expected"),
    [(8, Counters(), 12), (8, EIGHT, 12), (4, EIGHT, 4 + 16), (16, EIGHT, 4 + 4)],
)
def test_train_samples_are_counted_from_those_consumed(batch: int, start: Counters, expected: int) -> None:
    config = small_config(train_batch_size=batch, train_samples=96, train_iters=None)
    assert with_length(config, start, None).training.train_iters == expected


def own_disk_rank(rank: int, world_size: int, disks: list[str]) -> None:
    """A worker on a host of its own, whose disk holds files under the same names."""
    os.chdir(disks[rank])
    os.environ["LOCAL_RANK"] = "0"
    settings = {"data_path": "text", "use_shared_fs": False, "train_iters": 2, "eval_iters": 0}
    run_rank(rank, world_size, {**BASE, **settings})


@pytest.mark.parametrize("same", [True, False])
def test_hosts_whose_token_files_differ_are_refused(same: bool, tmp_path: Path) -> None:
    """Else the losses are those of a mixture, and no line says so."""
    disks = [tmp_path / "one", tmp_path / "two"]
    for disk in disks:
        disk.mkdir()
        make_dataset(disk)
    if not same:
        tokens = bytearray((disks[1] / "text.bin").read_bytes())
        tokens[:2] = tokens[2:4]
        tokens[:2] = bytes(2)
        (disks[1] / "text.bin").write_bytes(tokens)
        with pytest.raises(RankFailedError, match="rank 1 reads another token file than rank 0"):
            run_distributed(own_disk_rank, 2, [str(disk) for disk in disks])
    else:
        run_distributed(own_disk_rank, 2, [str(disk) for disk in disks])
