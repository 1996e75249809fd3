"""What the examples' tests share: text to learn from, and scripts run at small size."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SMALL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "train_iters": 20,
    "log_interval": 5,
    "eval_interval": 20,
    "eval_iters": 1,
    "precision": "fp32",
}


def flags(settings: dict[str, object]) -> list[str]:
    """Keys as flags of a command line."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return [word for key, text in texts.items() for word in (f"--{key.replace('_', '-')}", text)]


def write_text(path: Path, documents: int = 40) -> None:
    """Source text of this installation as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:documents]
    lines = [json.dumps({"text": source.read_text(encoding="utf-8", errors="replace")[:8000]}) for source in sources]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(command: list[str], cwd: Path, seconds: float = 400, **environment: str) -> str:
    """Runs a command to its end, which must be a good one; returns what it printed on both outputs."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def plan(*arguments: str) -> dict[str, object]:
    """The plan of `deepy.py train.py` as JSON, from the checkout."""
    reported = subprocess.run(
        [str(ROOT / "deepy.py"), "train.py", *arguments, "--dry-run", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, object] = json.loads(reported.stdout)
    return found
