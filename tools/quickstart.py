#!/usr/bin/env python
"""Small end-to-end run: text, tokenizer, tokens, training, measurements, picture, samples.

    python tools/quickstart.py [--workers N] [--fresh]

It only runs commands of the user interface, and prints them, so each line can be adapted to other data. Finished stages
are not repeated; an interrupted training resumes from its checkpoint. Nothing is downloaded. Exit code 0 when every
stage succeeded, 130 when interrupted, else that of the error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import ConfigError, RunError
from megatron.launcher.hosts import local_devices
from megatron.output_streams import escape_characters
from tools.stages import Stage, Stamps, run_stages

ROOT = Path(__file__).resolve().parent.parent
WORK_DIR = Path("runs/quickstart")  # configs/quickstart.yml names the same files
CONFIG = "configs/quickstart.yml"
CORPUS = "python_stdlib"
VOCABULARY = 4096  # [tokens]
PROMPT_END = "<<<end>>>"
PROMPTS = (
    "def read_lines(path):",
    "class Stack:\n    def __init__(self):",
    "@dataclass\nclass",
    "Return the number of",
)
MAX_SHOWN = 500  # of each sample [characters]


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = argparse.ArgumentParser(description="Train, measure and sample a small model, from text to samples.")
    result.add_argument("--workers", type=int, help="ranks to train on; the GPUs here, else two CPU processes")
    result.add_argument("--fresh", action="store_true", help=f"forget what earlier runs left in {WORK_DIR}")
    return result


def training_workers(args: int | None) -> int:
    """Returns the number of training ranks: a power of two, at most 8, so that it divides the batch."""
    there = len(local_devices(os.environ, Path("/dev"))) or min(2, os.cpu_count() or 1)
    requested = there if args is None else args
    if requested < 1:
        raise ConfigError.of("at least one worker is needed", key="--workers", value=requested, location="command line")
    return 1 << (min(requested, 8).bit_length() - 1)


def make_stages(workers: int) -> list[Stage]:
    """Returns all stages."""
    return [*text_stages(), *training_stages(workers), *measuring_stages(workers)]


def text_stages() -> list[Stage]:
    """Returns the stages of text, tokenizer and tokens."""
    corpus, tokenizer = WORK_DIR / CORPUS, WORK_DIR / "tokenizer.json"
    train, valid = corpus / "train.jsonl", corpus / "valid.jsonl"
    learn = ("tools/train_tokenizer.py", "--input", str(train), "--vocab-size", str(VOCABULARY))
    encode = ("tools/preprocess_data.py", "--tokenizer-type", "HFTokenizer", "--vocab-file", str(tokenizer))
    stages = [
        Stage(
            "text",
            f"gather the source and the help texts of Python {platform.python_version()}; hold some files out",
            (sys.executable, "prepare_data.py", CORPUS, "--data-dir", str(WORK_DIR), "--force-redownload"),
            (train, valid, corpus / "valid.txt", corpus / "cloze.jsonl"),
        ),
        Stage(
            "tokenizer",
            f"learn a byte-level BPE of {VOCABULARY:,} tokens from the training text",
            (sys.executable, *learn, "--tokenizer-output-path", str(tokenizer)),
            (tokenizer,),
            after=("text",),
        ),
    ]
    for name, source in (("train", train), ("valid", valid)):
        prefix = WORK_DIR / "tokens" / name
        stages.append(
            Stage(
                f"{name}-tokens",
                f"turn the {'training' if name == 'train' else 'held-out'} text into tokens",
                (sys.executable, *encode, "--append-eod", "--input", str(source), "--output-prefix", str(prefix)),
                tuple(prefix.with_name(f"{name}_text_document{suffix}") for suffix in (".bin", ".idx")),
                after=("text", "tokenizer"),
            )
        )
    return stages


def training_stages(workers: int) -> list[Stage]:
    """Returns the stages of training and its picture. An interrupted training is resumed."""
    checkpoints, logs, picture = WORK_DIR / "checkpoints", WORK_DIR / "logs", WORK_DIR / "curve.png"
    return [
        Stage(
            "train",
            f"train on {workers} worker{'s' * (workers > 1)} (Ctrl-C saves and stops; the same command goes on)",
            (*deepy("train.py", workers), "--load", str(checkpoints), "--load-fallback", "fresh"),
            (checkpoints / "latest", logs / "metrics.jsonl"),
            reads=(Path(CONFIG),),
            after=("train-tokens", "valid-tokens"),
            clean_up=lambda: [shutil.rmtree(folder, ignore_errors=True) for folder in (checkpoints, logs)] and None,
        ),
        Stage(
            "picture",
            "draw the loss",
            (sys.executable, "tools/plot_metrics.py", str(logs), "-o", str(picture), "--title", "quickstart"),
            (picture,),
            after=("train",),
        ),
    ]


def measuring_stages(workers: int) -> list[Stage]:
    """Returns the stages of measurements and samples."""
    checkpoint = ("--load", str(WORK_DIR / "checkpoints"))
    corpus, evaluation, samples = WORK_DIR / CORPUS, WORK_DIR / "evaluation", WORK_DIR / "samples.jsonl"
    batch, held_out = ("--eval-batch-size", "32"), ("--eval-text", str(corpus / "valid.jsonl"))
    tasks = ("--eval-include-path", str(corpus / "tasks"), "--eval-results-prefix", str(evaluation / CORPUS))
    return [
        Stage(
            "bits",
            "measure bits per byte of the held-out text, beside compressors",
            (*deepy("tools/bits_per_byte.py", workers), *checkpoint, *batch, *held_out),
            (WORK_DIR / "logs" / "bits_per_byte" / "bits_per_byte.json",),
            after=("train",),
        ),
        Stage(
            "cloze",
            "choose which of four held-out lines comes next, with lm-eval",
            (*deepy("evaluate.py", 1), *checkpoint, *batch, *tasks, "--eval_tasks", f"{CORPUS}_cloze"),
            (evaluation,),
            after=("train",),
        ),
        Stage(
            "samples",
            "let the model write",
            (*deepy("generate.py", 1), *checkpoint, "-i", str(WORK_DIR / "prompts.txt"), "-o", str(samples)),
            (samples,),
            reads=(WORK_DIR / "prompts.txt",),
            after=("train",),
        ),
    ]


def deepy(script: str, workers: int) -> tuple[str, ...]:
    """Returns a command of the launcher with the quickstart's configuration."""
    return (sys.executable, "deepy.py", script, CONFIG, "--num-gpus", str(workers))


def summary(seconds: Mapping[str, float]) -> str:
    """Formats the measurements, samples and next steps."""
    bits = json.loads((WORK_DIR / "logs" / "bits_per_byte" / "bits_per_byte.json").read_text(encoding="utf-8"))
    newest = max((WORK_DIR / "evaluation").glob("*.json"), key=lambda path: path.stat().st_mtime)
    scores = json.loads(newest.read_text(encoding="utf-8"))["results"][f"{CORPUS}_cloze"]
    lines = ["", "Held-out text, bits per byte (less is better)"]
    measures = {"this model": bits["bits_per_byte"], "gzip -9": bits["gzip -9"], "xz -9e": bits["xz -9e"]}
    lines += [f"  {name:<11}{value:6.3f}" for name, value in measures.items()]
    lines += ["", f"Next line out of four: {scores['acc,none']:.1%} right (chance 25.0%)", "", "Samples"]
    for line in (WORK_DIR / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        text = f"{sample['context']}{sample['text'] or ''}"[:MAX_SHOWN]
        lines += [*(f"  | {row}" for row in text.splitlines()), "  --"]
    generate = shlex.join(deepy("generate.py", 1))
    lines += [
        "",
        f"The curve: {WORK_DIR / 'curve.png'}",
        f"Talk to it: {generate} --load {WORK_DIR / 'checkpoints'} --text-gen-type interactive",
        "Your own text, more GPUs: docs/quickstart.md",
        "",
        f"{sum(seconds.values()):.0f} s in all: " + ", ".join(f"{name} {took:.0f}" for name, took in seconds.items()),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Runs one command line; returns the exit code."""
    args = parser().parse_args(arguments)
    os.chdir(ROOT)
    try:
        if args.fresh:
            shutil.rmtree(WORK_DIR, ignore_errors=True)
        WORK_DIR.mkdir(parents=True, exist_ok=True)
        (WORK_DIR / "prompts.txt").write_text(PROMPT_END.join(PROMPTS), encoding="utf-8")
        stages = make_stages(training_workers(args.workers))
        seconds = run_stages(stages, Stamps(WORK_DIR / "stages"), lambda line: print(line, flush=True), os.environ)
        print(summary(seconds))
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    escape_characters()
    sys.exit(main(sys.argv[1:]))
