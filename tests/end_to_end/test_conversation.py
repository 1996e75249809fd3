"""Interactive generation through deepy.py on a terminal: two turns, one of them stopped with Ctrl-C."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import yaml

from tests.end_to_end.runs import BASE, make_dataset, run

ROOT = Path(__file__).resolve().parents[2]


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.screen = ""
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True, close_fds=True
        )
        os.close(slave)

    def wait_for(self, text: str, times: int = 1, seconds: float = 120) -> None:
        """Reads until the text has been on the screen so many times."""
        deadline = time.monotonic() + seconds
        while self.screen.count(text) < times:
            assert time.monotonic() < deadline, self.screen
            if select.select([self._master], [], [], 0.2)[0]:
                self.screen += os.read(self._master, 4096).decode(errors="replace")

    def press_ctrl_c_until(self, text: str) -> None:
        """The program sees a press right before it begins to read once it has read, so it may take another."""
        for _ in range(60):
            os.kill(self.process.pid, signal.SIGINT)
            with suppress(AssertionError):
                self.wait_for(text, seconds=2)
                return
        raise AssertionError(self.screen)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> int:
        code = self.process.wait(60)
        os.close(self._master)
        return code


def test_ctrl_c_stops_one_answer_and_ctrl_d_the_session(tmp_path: Path) -> None:
    settings = {**BASE, "seq_length": 2048, "max_position_embeddings": 2048, "train_batch_size": 1}
    run(1, tmp_path, data_path=make_dataset(tmp_path), save=str(tmp_path / "save"), **{
        **settings, "train_iters": 1, "eval_iters": 0, "checkpoint_factor": 100})  # fmt: skip
    expected = {
        **settings,
        "load": str(tmp_path / "save"),
        "log_dir": str(tmp_path / "log"),
        "text_gen_type": "interactive",
        "maximum_tokens": 1900,
        "temperature": 1.0,
    }
    (tmp_path / "talk.yml").write_text(yaml.safe_dump(expected), encoding="utf-8")
    terminal = Terminal(sys.executable, "deepy.py", "generate.py", str(tmp_path / "talk.yml"))
    try:
        terminal.wait_for("prompt> ")
        terminal.type("hello\n")
        terminal.wait_for("hello\r\n")
        time.sleep(0.5)  # some of 1900 tokens, by far not all
        os.kill(terminal.process.pid, 2)
        terminal.wait_for("prompt> ", 2)
        terminal.type("and now\n")
        time.sleep(0.3)
        os.kill(terminal.process.pid, 2)
        terminal.wait_for("prompt> ", 3)
        terminal.press_ctrl_c_until("Ctrl-D ends the session")
        terminal.type("\x04")
        assert terminal.close() == 0, terminal.screen
    finally:
        terminal.process.kill()
