"""What is missing is said before workers start."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils.cpp_extension import _get_build_directory

from megatron.errors import ConfigError
from megatron.launcher import preflight
from megatron.launcher.preflight import HOST_ADAM, check, missing_for_build, op_folder


@pytest.fixture
def _bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that is alone in its folder, so that PATH decides what is there."""
    monkeypatch.setattr(preflight.sys, "executable", str(tmp_path / "elsewhere/python"))


def test_the_position_of_the_compiled_op_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert op_folder(os.environ).is_relative_to(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(op_folder(os.environ).parent))
    assert op_folder(os.environ) == Path(_get_build_directory(HOST_ADAM, verbose=False))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "chosen"))
    assert op_folder(os.environ) == Path(_get_build_directory(HOST_ADAM, verbose=False))


@pytest.mark.usefixtures("_bare")
def test_every_missing_tool_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.sysconfig, "get_path", lambda _name: str(tmp_path))
    environment = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    with pytest.raises(ConfigError) as caught:
        check("cpu", environment, host_adam=True)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "pip install ninja" in lines[0]
    assert "apt install g++" in lines[1]
    assert "Python.h" in lines[2]
    check("cpu", environment)  # no other run compiles anything of DeepSpeed's


@pytest.mark.usefixtures("_bare")
def test_a_compiled_op_needs_only_ninja(tmp_path: Path) -> None:
    (tmp_path / HOST_ADAM).mkdir()
    (tmp_path / HOST_ADAM / f"{HOST_ADAM}.so").touch()
    programs = tmp_path / "bin"
    programs.mkdir()
    environment = {"PATH": str(programs), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    with pytest.raises(ConfigError, match="pip install ninja") as caught:
        check("cpu", environment, host_adam=True)
    assert len(caught.value.issues) == 1
    (programs / "ninja").touch(mode=0o755)
    check("cpu", environment, host_adam=True)


@pytest.mark.parametrize(
    "needs", [{"host_adam": True}, {"zero": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/disk"}}}]
)
def test_operators_need_a_folder_that_can_be_written(needs: dict[str, Any]) -> None:
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": "/proc/nowhere/made"}
    with pytest.raises(ConfigError, match=r"operators cannot be compiled into this folder.*set TORCH_EXTENSIONS_DIR"):
        check("cpu", environment, **needs)
    check("cpu", environment)  # no other run needs one


def test_a_compiler_of_the_users_choice_counts(tmp_path: Path) -> None:
    (tmp_path / "clang++").touch(mode=0o755)
    reported = missing_for_build({"PATH": str(tmp_path), "CXX": "clang++"}, built=False)
    assert not any("C++ compiler" in str(issue) for issue in reported)


def test_two_environments_do_not_share_what_they_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    here = op_folder(environment)
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    assert op_folder(environment) != here


@pytest.mark.parametrize(
    ("line", "able"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 avx512_vnni", False),
        ("flags\t\t: fpu avx512f avx512_fp16", True),
        ("Features\t: fp asimd fphp asimdhp", True),
        ("model name\t: avx512_fp16", False),
    ],
)
def test_fp16_needs_a_processor_that_has_it(
    line: str, able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text(f"processor\t: 0\n{line}\n")
    assert preflight.computes_in_fp16(facts) is able
    monkeypatch.setattr(preflight, "CPUINFO", facts)
    if able:
        check("cpu", os.environ, precision="fp16")
    else:
        with pytest.raises(ConfigError, match="precision = 'fp16': this processor does not compute in fp16"):
            check("cpu", os.environ, precision="fp16")
        check("cuda", os.environ, precision="fp16")
        check("cpu", os.environ, precision="bfloat16")


def test_a_machine_that_does_not_say_computes_no_fp16(tmp_path: Path) -> None:
    assert not preflight.computes_in_fp16(tmp_path / "nothing")


@pytest.mark.parametrize("there", [True, False])
def test_a_disk_needs_libaio(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is asked, with the flags that DeepSpeed's build will get."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-I/elsewhere*-laio) exit {0 if there else 1};; esac\nexit 3\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "CFLAGS": "-I/elsewhere"}
    to_disk = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/disk"}}
    if there:
        check("cuda", environment, zero=to_disk)
    else:
        with pytest.raises(ConfigError, match="there is no libaio: offloading to a disk"):
            check("cuda", environment, zero=to_disk)
    check("cuda", environment, zero={"stage": 3, "offload_param": {"device": "cpu"}})
