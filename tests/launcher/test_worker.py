"""The worker's side: where its configuration comes from, how it stops, what its exit code means."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from megatron.config import Config, serialize
from megatron.errors import ConfigError, ConfigIssue, RunError
from megatron.launcher import preflight
from megatron.launcher.worker import StopSignal, worker_main
from megatron.launcher.worker_config import worker_config
from megatron.ranks import free_port
from tests.launcher.conftest import CONFIG, ROOT


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def _handlers() -> Iterator[None]:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.fixture
def config() -> Config:
    return Config.from_flat({"num_layers": 3, "hidden_size": 64})


def test_the_configuration_arrives_as_a_file_or_as_text(config: Config, tmp_path: Path) -> None:
    serialize.write(config, tmp_path / "config.json")
    for handed in (
        ["--run-config", "config.json"],
        ["--run_config=config.json", "--local_rank=3"],
        ["--megatron_config", serialize.encode(config), "--deepspeed_config", "e30="],
        [f"--megatron-config={serialize.encode(config)}"],
    ):
        assert worker_config(handed).model.num_layers == 3


def test_started_alone_the_worker_refuses_what_its_processor_cannot_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "conf.yml").write_text(CONFIG)
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu\n")
    monkeypatch.setattr(preflight, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), "conf.yml"])
    with pytest.raises(ConfigError, match="this processor does not compute in fp16"):
        worker_config(["conf.yml", "--precision", "fp16"])
    assert not list(tmp_path.glob("runs*"))  # before anything is written


def test_started_alone_the_worker_resolves_its_files_and_keeps_a_run_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "conf.yml").write_text(CONFIG)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), "conf.yml"])
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = worker_config(["conf.yml", "--seed", "5", "--local-rank=0"])
    assert found.parallelism.world_size == 4
    assert found.training.seed == 5
    assert found.observe.log_dir == str(tmp_path / "run")
    assert serialize.read(tmp_path / "run/config.json") == found


def test_only_rank_0_writes_the_run_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "conf.yml").write_text(CONFIG)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), "conf.yml"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    worker_config(["conf.yml"])
    assert not (tmp_path / "run").exists()


def test_no_configuration_at_all_is_a_issue_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ConfigError, match=r"\./deepy\.py train\.py CONF"):
        worker_config([])


def _exit_code(config: Config, tmp_path: Path, main: object) -> int:
    serialize.write(config, tmp_path / "config.json")
    return worker_main(main, ["--run-config", "config.json"])  # type: ignore[arg-type]


def test_exit_codes_of_a_worker(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def mistaken(_config: Config) -> None:
        raise ConfigError(ConfigIssue("wrong", key="a"), ConfigIssue("wrong too", key="b"))

    def failing(_config: Config) -> None:
        raise RunError.of("the disk is full", location="/data", hint="free some space")

    def interrupted(_config: Config) -> None:
        raise KeyboardInterrupt

    def broken(_config: Config) -> None:
        raise ValueError("an error of the program")

    assert _exit_code(config, tmp_path, lambda found: found.model.num_layers) == 3
    assert _exit_code(config, tmp_path, lambda _found: None) == 0
    assert _exit_code(config, tmp_path, mistaken) == 2
    assert capsys.readouterr().err == "a: wrong\nb: wrong too\n"
    assert _exit_code(config, tmp_path, failing) == 1
    assert capsys.readouterr().err == "/data: the disk is full; free some space\n"
    assert _exit_code(config, tmp_path, interrupted) == 130
    assert capsys.readouterr().err == ""
    assert _exit_code(config, tmp_path, broken) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_damaged_configuration_is_a_issue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{")
    assert worker_main(lambda _config: 0, ["--run-config", "config.json"]) == 2
    assert "config.json" in capsys.readouterr().err


def rank_3_of_4(config: Config, folder: Path, main: str) -> subprocess.CompletedProcess[str]:
    """A process whose worker script has this as the lines of main(config)."""
    serialize.write(config, folder / "config.json")
    (folder / "script.py").write_text(
        "import atexit, os, sys, threading, time\n"
        "from megatron.errors import RunError\n"
        "from megatron.launcher.worker import worker_main\n"
        "def main(config):\n" + main + "sys.exit(worker_main(main, sys.argv[1:]))\n"
    )
    return subprocess.run(
        [sys.executable, "script.py", "--run-config", "config.json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "::1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_rank_of_many_names_itself_and_leaves_without_waiting(config: Config, tmp_path: Path) -> None:
    """The interpreter's own ending would wait for the thread, as it may for a process group."""
    done = rank_3_of_4(
        config,
        tmp_path,
        "    threading.Thread(target=time.sleep, args=(600,)).start()\n    raise RunError.of('too bad')\n",
    )
    assert (done.returncode, done.stderr) == (1, "rank 3: too bad\n")


def test_a_finished_rank_of_many_destroys_nothing_behind_its_exit_handlers(config: Config, tmp_path: Path) -> None:
    """Threads end and exit handlers run as ever; what the interpreter destroys afterwards could abort the process."""
    done = rank_3_of_4(
        config,
        tmp_path,
        "    threading.Thread(target=lambda: (time.sleep(1), print('thread'))).start()\n"
        "    atexit.register(print, 'handler')\n"
        "    sys.aborts = type('Aborts', (), {'__del__': lambda self, abort=os.abort: abort()})()\n"
        "    return 0\n",
    )
    assert (done.returncode, done.stdout) == (0, "thread\nhandler\n"), done.stderr


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stop_signal_only_sets_the_flag(number: signal.Signals) -> None:
    stop = StopSignal.install()
    stop.listen()
    assert not stop.requested
    os.kill(os.getpid(), number)
    assert stop.requested
    assert stop.received == number


@pytest.mark.usefixtures("_handlers")
def test_a_second_interrupt_interrupts() -> None:
    stop = StopSignal.install()
    stop.listen()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested


STOPPED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
WAITS = """
import os, sys
from megatron.launcher.worker import StopSignal
stop = StopSignal.install()
import torch.distributed as dist
ranks = []
for port in sys.argv[1:]:
    ranks.append(os.fork())
    if not ranks[-1]:
        dist.TCPStore("127.0.0.1", int(port), 2, is_master=True, wait_for_workers=True)
print(*ranks, flush=True)
for rank in ranks:
    print(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def ended() -> dict[int, int]:
    """Signal -> exit code of a rank that waited in torch for the others when the signal came."""
    waiting = subprocess.Popen(
        [sys.executable, "-c", WAITS, *(str(free_port()) for _ in STOPPED)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert waiting.stdout is not None
        ranks = waiting.stdout.readline().split()
        time.sleep(0.5)
        for rank, number in zip(ranks, STOPPED, strict=True):
            os.kill(int(rank), number)
        return dict(zip(STOPPED, map(int, waiting.communicate(timeout=10)[0].split()), strict=True))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(waiting.pid, signal.SIGKILL)
        waiting.wait()


@pytest.mark.parametrize("number", STOPPED)
def test_a_stop_signal_ends_a_rank_that_waits_for_the_others(number: signal.Signals, ended: dict[int, int]) -> None:
    """A handler of Python's would run only when torch's wait returns, after `collective_timeout`."""
    assert ended[number] == -number
