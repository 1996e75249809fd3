"""Files of variables for ranks on other hosts: what DeepSpeed's runner cannot hand over is refused before it starts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron.errors import ConfigError
from megatron.launcher.commands.local import Rendezvous
from megatron.launcher.commands.multi_host import multi_host_command
from megatron.launcher.env_file import check_env_files
from megatron.launcher.hosts import Hosts

TWO = Hosts({"first": (0,), "second": (0,)}, "cpu", 2)
ACCEPTED = ["abc=def==", "A=", "WANDB_API_KEY=0123abcd", "B=it's {1} (two); <three> & *!#~", "_C=a b  c"]
REFUSED = {
    "# keys": "comments and empty ones too",
    "": "comments and empty ones too",
    "export A=1": "takes every line as NAME=VALUE",
    "1A=2": "takes every line as NAME=VALUE",
    'A={"a": 1}': 'the value of A holds "',
    "A=pa$$word": "the value of A holds \\$",
    "A=`id`": "the value of A holds `",
    "A=a\\b": r"the value of A holds \\",
}


@pytest.mark.parametrize("line", ACCEPTED)
def test_what_is_accepted_reaches_a_shell_as_it_is(line: str, tmp_path: Path) -> None:
    """Between double quotes, as the runner writes it."""
    (tmp_path / ".deepspeed_env").write_text(f"A=1\n{line}\n")
    check_env_files({"HOME": str(tmp_path)}, tmp_path / "elsewhere")
    name, _, value = line.partition("=")
    command = f'export {name}="{value}"; printf %s "${name}"'
    assert subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout == value


@pytest.mark.parametrize("line", REFUSED)
@pytest.mark.parametrize("where", ["home", "work"])
def test_a_line_that_cannot_be_handed_over_is_refused(line: str, where: str, tmp_path: Path) -> None:
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    path = tmp_path / where / ".deepspeed_env"
    path.write_text(f"A=1\n{line}\nB=2\n")
    with pytest.raises(ConfigError, match=f"{path}, line 2: .*{REFUSED[line]}"):
        check_env_files({"HOME": str(tmp_path / "home")}, tmp_path / "work")


def test_the_name_may_be_another_and_every_issue_is_reported(tmp_path: Path) -> None:
    (tmp_path / "vars").write_text("# a\n\nA=1\n")
    check_env_files({"HOME": str(tmp_path)}, tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_env_files({"HOME": str(tmp_path), "DS_ENV_FILE": "vars"}, tmp_path)
    assert len(caught.value.issues) == 2


@pytest.mark.parametrize(("launcher", "refused"), [("pdsh", True), ("openmpi", True), ("jsrun", False)])
def test_launchers_over_the_runner_check_it(
    launcher: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".deepspeed_env").write_text("# a\n")
    rendezvous = Rendezvous(launcher=launcher, master_port=1234)
    try:
        multi_host_command(TWO, rendezvous, ("train.py",), tmp_path, {})
    except ConfigError:
        assert refused
    else:
        assert not refused
