"""The page: complete as a file, alive when served, and drawn by a real browser."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.dashboard.page import server, static_page
from megatron.dashboard.runs import open_runs
from megatron.errors import ConfigError
from tests.dashboard.folders import make_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [make_run(tmp_path / "first", lr=0.1), make_run(tmp_path / "second", scale=1.2, lr=0.2)]


@pytest.fixture
def address(folders: list[Path]) -> Iterator[str]:
    with server(open_runs(folders), "127.0.0.1", 0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def test_the_server_gives_the_page_and_what_is_new(address: str, folders: list[Path]) -> None:
    assert "<title>NeoX runs</title>" in get(address)
    assert len(json.loads(get(f"{address}/data.json"))["runs"][0]["curves"]["train/lm_loss"]) == 50
    with (folders[0] / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 51, "train/lm_loss": 2.5}\n')
    assert json.loads(get(f"{address}/data.json"))["runs"][0]["curves"]["train/lm_loss"][-1] == [51, 2.5]
    with pytest.raises(urllib.error.HTTPError):
        get(f"{address}/etc/passwd")


def test_a_port_that_is_taken_is_a_issue(address: str, folders: list[Path]) -> None:
    with pytest.raises(ConfigError, match="cannot be served"):
        server(open_runs(folders), "127.0.0.1", int(address.rpartition(":")[2]))


def test_the_page_is_one_file_that_asks_for_nothing(folders: list[Path]) -> None:
    page = static_page(open_runs(folders))
    assert not re.search(r"(src|href)\s*=", page)
    assert '"first"' in page and '"key": "lr"' in page


def test_a_name_cannot_end_the_script(tmp_path: Path) -> None:
    page = static_page(open_runs([make_run(tmp_path / "run", note="</script><b>")]))
    assert page.count("</script>") == 1


def test_the_tool_writes_the_page(folders: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "tools/dashboard.py", *map(str, folders), "-o", str(tmp_path / "page.html")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_the_tool_reports_a_wrong_folder(tmp_path: Path) -> None:
    command = [sys.executable, "tools/dashboard.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and str(tmp_path) in done.stderr and "Traceback" not in done.stderr


@pytest.mark.system
def test_a_browser_draws_every_chart(address: str, tmp_path: Path) -> None:
    """Chromium runs the script against the live server: curves, ranks and differences must be in the document."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--disable-sync",
        "--disable-quic",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=4000",
    ]
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", address], check=False, capture_output=True, text=True, timeout=120
    )
    document = html.unescape(done.stdout)
    drawn = set(re.findall(r'data-metric="([^"]+)"', document))
    assert {"train/lm_loss", "validation/lm_loss", "train/learning_rate"} <= drawn, done.stderr[-2000:]
    loss = document.split('data-metric="train/lm_loss"')[1].split("</section>")[0]
    assert loss.count("<path") == 2 and "NaN" not in loss
    assert "Ranks at the last report" in document and "Where the configurations differ" in document
