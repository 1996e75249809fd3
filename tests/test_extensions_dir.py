"""Where caches are kept, also for a user without a home folder, as in containers with a user id of their own."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from megatron.errors import ConfigError
from megatron.extensions_dir import VARIABLE, extensions_folder, user_cache
from megatron.kernels import cpp_build
from megatron.metrics.wandb_key import wandb_key


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No HOME, and a user id that the system does not know."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in (VARIABLE, "XDG_CACHE_HOME", "HOME", "NETRC", "WANDB_API_KEY", "WANDB_LOCAL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_caches_are_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/me")
    assert user_cache({}) == Path("/users/me/.cache")
    assert extensions_folder({}).parent == Path("/users/me/.cache/torch_extensions")


def test_a_user_without_a_home_folder_names_one(homeless: None) -> None:
    with pytest.raises(ConfigError, match=r"no home folder .*; set HOME"):
        extensions_folder({})
    assert user_cache({"XDG_CACHE_HOME": "/caches"}) == Path("/caches")
    assert extensions_folder({VARIABLE: "/extensions"}) == Path("/extensions")


def test_a_user_without_a_home_folder_has_no_key(homeless: None) -> None:
    assert wandb_key("https://api.wandb.ai") is None


def test_a_user_without_a_home_folder_trains_without_compiled_kernels(homeless: None) -> None:
    assert "no home folder" in str(cpp_build.library.__wrapped__())
