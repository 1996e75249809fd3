"""Whether ranks see what rank 0 writes: at once, late, never, and where rank 0 cannot write at all."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from megatron.distributed.shared_folder import sees_files_of_rank_0
from megatron.errors import RunError
from tests.multi_rank import RankFailedError, run_distributed


def look(rank: int, world_size: int, root: str, own: bool, patience: float) -> bool:
    return sees_files_of_rank_0(Path(root) / (f"host{rank}" if own else "all"), patience=patience)


def look_at_a_slow_mount(rank: int, world_size: int, root: str, patience: float) -> bool:
    """Rank 1 sees rank 0's folder half a second later."""
    theirs, mine = Path(root) / "host0", Path(root) / f"host{rank}"

    def mount() -> None:
        time.sleep(0.5)
        mine.symlink_to(theirs)

    if rank:
        threading.Thread(target=mount).start()
    return sees_files_of_rank_0(mine, patience=patience)


def test_ranks_of_one_folder_see_the_file_and_others_do_not(tmp_path: Path) -> None:
    assert run_distributed(look, 2, str(tmp_path), False, 0.0) == [True, True]
    assert list((tmp_path / "all").iterdir()) == []
    assert run_distributed(look, 2, str(tmp_path), True, 0.2) == [True, False]
    assert list((tmp_path / "host0").iterdir()) == []


def test_a_file_system_may_show_the_file_late(tmp_path: Path) -> None:
    assert run_distributed(look_at_a_slow_mount, 2, str(tmp_path), 30.0) == [True, True]


def test_every_rank_hears_that_rank_0_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RankFailedError, match="rank 0 cannot write there") as failure:
        run_distributed(look, 2, str(tmp_path / "file"), False, 0.0)
    assert RunError.__name__ in str(failure.value)


def test_a_process_alone_sees_its_own_files(tmp_path: Path) -> None:
    assert sees_files_of_rank_0(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []
