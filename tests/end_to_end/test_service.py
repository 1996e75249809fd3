"""The text service as people start it: through deepy.py, on several ranks, with its terminal client, and its end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end.launches import ROOT, free_port
from tests.end_to_end.runs import BASE, make_dataset, run

NEW = 400
SETTINGS = {**BASE, "seq_length": 512, "max_position_embeddings": 512, "train_batch_size": 1}
LAYOUTS = {
    "one process": {},
    "tensor 2": {"num_gpus": 2, "model_parallel_size": 2},
    "pipeline 2": {"num_gpus": 2, "pipe_parallel_size": 2},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    once = {**SETTINGS, "train_iters": 1, "eval_iters": 0, "checkpoint_factor": 100}
    run(1, folder, **once, data_path=make_dataset(folder), save=str(folder / "save"))
    return folder / "save"


def ask(url: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """(status, answer); status 0 if the port is closed."""
    headers = {"Content-Type": "application/json", "Authorization": "Bearer geheim"}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError:
        return 0, None


def stream(url: str, body: dict[str, Any], give: Callable[[str], None]) -> None:
    """Gives each data line of a stream when it arrives."""
    headers = {"Content-Type": "application/json", "Authorization": "Bearer geheim"}
    request = urllib.request.Request(url, json.dumps({**body, "stream": True}).encode(), headers)
    with urllib.request.urlopen(request, timeout=200) as response:
        for line in response:
            if line.strip():
                give(line.decode().removeprefix("data: ").strip())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_serves_and_drains_when_asked_to_leave(layout: str, saved: Path, tmp_path: Path) -> None:
    port = free_port()
    expected = {**SETTINGS, **LAYOUTS[layout], "load": str(saved), "log_dir": str(tmp_path), "serve_port": port}
    (tmp_path / "serve.yml").write_text(yaml.safe_dump(expected | {"serve_key": "geheim"}), encoding="utf-8")
    command = [sys.executable, "deepy.py", "tools/run_text_generation_server.py", str(tmp_path / "serve.yml")]
    with (tmp_path / "out.txt").open("w") as out:
        service = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: ask(f"{url}/health")[0] == 200, service, tmp_path / "out.txt")
        body = {"prompt": "def read(", "max_tokens": 12, "temperature": 0}
        status, answer = ask(f"{url}/v1/completions", body)
        assert status == 200 and answer["usage"]["completion_tokens"] > 0
        scores_agree(url, body)
        client = [sys.executable, "tools/text_generation_cli.py", f"127.0.0.1:{port}", "--tokens", "12"]
        said = type_into([*client, "--key", "geheim"], b"def read(\n")
        assert said.returncode == 0 and said.stdout.decode() == answer["choices"][0]["text"] + "\n"
        refused = type_into(client, b"x\n").stderr.decode()
        assert "401" in refused and "key" in refused

        pieces: list[str] = []
        long = {"prompt": "x", "max_tokens": NEW, "temperature": 0}
        reader = threading.Thread(target=stream, args=(f"{url}/v1/completions", long, pieces.append))
        reader.start()
        until(lambda: pieces, service, tmp_path / "out.txt")
        service.send_signal(signal.SIGTERM)
        assert len(pieces) < NEW // 2, "the text is not yet complete"
        until(lambda: ask(f"{url}/health")[0] != 200, service, tmp_path / "out.txt", 10)
        assert ask(f"{url}/v1/completions", body)[0] in (503, 0)
        reader.join(200)
        assert not reader.is_alive() and pieces[-1] == "[DONE]"
        assert json.loads(pieces[-2])["choices"][0]["finish_reason"] in ("length", "stop")
        assert service.wait(60) == 0, (tmp_path / "out.txt").read_text()
    finally:
        if service.poll() is None:
            service.kill()


def scores_agree(url: str, body: dict[str, Any]) -> None:
    """The scores of a text that is given are those that its tokens had when it was made, on every layout."""
    plain = {**body, "logit_bias": {"101": 100}, "logprobs": 1, "echo": True}  # letters, which are read as written
    made = ask(f"{url}/v1/completions", plain)[1]["choices"][0]
    given = {"prompt": made["text"], "max_tokens": 0, "echo": True, "logprobs": 1}
    again = ask(f"{url}/v1/completions", given)[1]["choices"][0]["logprobs"]
    assert again["tokens"] == made["logprobs"]["tokens"] and again["token_logprobs"][0] is None
    assert again["token_logprobs"][1:] == pytest.approx(made["logprobs"]["token_logprobs"][1:], abs=1e-3)
    status, reported = ask(f"{url}/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
    assert status == 400 and "chat template" in reported["error"]["message"]


def type_into(command: list[str], lines: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, check=False, cwd=ROOT, input=lines, capture_output=True, timeout=60)


def until(holds: Any, service: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert service.poll() in (None, 0) and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
