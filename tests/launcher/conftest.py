"""A way to run deepy.py in seconds: DeepSpeed's real launch.py, beside stand-ins for what it imports from DeepSpeed.

launch.py needs three constants, a logger and an accelerator object of the deepspeed package, whose own import costs
seconds and brings torch. tests/launcher/test_deepy.py runs it once with the real package.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STAND_INS = {
    "deepspeed/__init__.py": "",
    "deepspeed/launcher/__init__.py": "",
    "deepspeed/constants.py": """
        TORCH_DISTRIBUTED_DEFAULT_PORT = 29500
        CROSS_RANK, CROSS_SIZE = "CROSS_RANK", "CROSS_SIZE"
        """,
    "deepspeed/utils/__init__.py": """
        import logging
        logger = logging.getLogger("stand-in")
        def get_numactl_cmd(*_): raise NotImplementedError
        def set_log_level_from_string(_): pass
        """,
    "deepspeed/accelerator/__init__.py": """
        class Accelerator:
            def set_visible_devices_envs(self, environment, ids): pass
            def visible_devices_envs(self): return []
        def get_accelerator(): return Accelerator()
        """,
}

CONFIG = """\
num_layers: 2
hidden_size: 64
num_attention_heads: 2
seq_length: 32
train_micro_batch_size_per_gpu: 2
train_iters: 10
lr_decay_iters: 10
optimizer: {type: Adam, params: {lr: 1.0e-3}}
tokenizer_type: CharLevelTokenizer
num_gpus: 2
log_dir: run
"""


@pytest.fixture(scope="session")
def light_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which `deepspeed.launcher.launch` is the installed one and all else a stand-in."""
    folder = tmp_path_factory.mktemp("light")
    for name, text in STAND_INS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    installed = Path(str(metadata.distribution("deepspeed").locate_file("deepspeed/launcher/launch.py")))
    shutil.copy(installed, folder / "deepspeed/launcher/launch.py")
    return folder


@dataclass
class Started:
    """A running deepy.py and the folder that it runs in."""

    process: subprocess.Popen[str]
    folder: Path

    def finish(self, timeout: float = 30) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def wait_for(self, *names: str, timeout: float = 30) -> list[str]:
        """Waits until the workers have written these files and returns what they hold."""
        deadline = time.monotonic() + timeout
        paths = [self.folder / name for name in names]
        while not all(path.exists() and path.read_text().endswith("\n") for path in paths):
            assert time.monotonic() < deadline, f"{names} did not appear"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)
        return [path.read_text().strip() for path in paths]


class Deepy:
    """Starts deepy.py on a worker script of the test's own."""

    def __init__(self, folder: Path, light: Path) -> None:
        self.folder = folder
        (folder / "conf.yml").write_text(CONFIG)
        self.environment = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
        self.environment |= {"PYTHONPATH": str(light), "DS_ACCELERATOR": "cpu"}

    def script(self, body: str) -> None:
        start = "# takes the place of a worker that uses megatron.launcher.worker\nimport os, sys, time, signal\n"
        start += "rank = int(os.environ['RANK'])\n"
        (self.folder / "work.py").write_text(start + textwrap.dedent(body))

    def start(self, body: str, *arguments: str) -> Started:
        self.script(body)
        command = [sys.executable, str(ROOT / "deepy.py"), "work.py", "conf.yml", *arguments]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        return Started(process, self.folder)

    def run(self, body: str, *arguments: str) -> tuple[int, str, str]:
        return self.start(body, *arguments).finish()


@pytest.fixture
def deepy(tmp_path: Path, light_deepspeed: Path) -> Deepy:
    return Deepy(tmp_path, light_deepspeed)


FLUX = """\
    #!{python}
    # Stands in for `flux run`: starts every task on this host, with the names that Flux gives.
    import os, subprocess, sys
    words = sys.argv[1:]
    tasks = int(words[words.index("--nodes") + 1]) * int(words[words.index("--tasks-per-node") + 1])
    command = words[words.index({python!r}):]
    def environment(rank):
        names = dict(FLUX_TASK_RANK=str(rank), FLUX_JOB_SIZE=str(tasks), FLUX_TASK_LOCAL_ID=str(rank))
        return dict(os.environ, **names)
    started = [subprocess.Popen(command, env=environment(rank)) for rank in range(tasks)]
    sys.exit(max(each.wait() for each in started))
    """


@pytest.fixture
def flux(deepy: Deepy) -> Deepy:
    """deepy.py beside a stand-in for flux."""
    programs = deepy.folder / "bin"
    programs.mkdir()
    (programs / "flux").write_text(textwrap.dedent(FLUX).format(python=sys.executable))
    (programs / "flux").chmod(0o755)
    deepy.environment["PATH"] = f"{programs}:{deepy.environment['PATH']}"
    with (deepy.folder / "conf.yml").open("a") as configuration:
        configuration.write("launcher: flux\nnum_nodes: 1\n")
    return deepy


def is_running(pid: int) -> bool:
    """Whether the process still runs; one that only waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in {"Z", "X"}


def wait_until_gone(*pids: int, timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if is_running(pid)]}"
        time.sleep(0.02)
