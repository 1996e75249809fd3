"""What a process reads of its rank, and ports that are free."""

from __future__ import annotations

import socket

import pytest

from megatron.ranks import NOT_OUTGOING, Ranks, free_port


def test_the_environment_names_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == Ranks(rank=5, local_rank=1, world_size=8)


@pytest.mark.parametrize("empty", [False, True])
def test_a_process_started_alone_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch, empty: bool) -> None:
    """In a batch script Slurm names as many tasks as the job may have, and this process is none of them."""
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "") if empty else monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks(rank=0, local_rank=0, world_size=1)


def test_a_free_port_can_be_listened_on_and_a_taken_one_is_refused() -> None:
    port = free_port()
    assert port in NOT_OUTGOING
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        assert free_port() != port
        with pytest.raises(OSError, match="in use"):
            free_port(port)
