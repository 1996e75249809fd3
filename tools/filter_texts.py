#!/usr/bin/env python
"""Scores texts, and writes those with the lowest scores: data to train a model away from what a scorer finds.

    python tools/filter_texts.py scorer.yml --input generated.jsonl --output retained.jsonl

scorer.yml names the scorer (`scorer: words` with `words: FILE`, or `scorer: module:function` of an installed package),
the share of texts to write (`keep: 0.5`) and the score from which on a text counts in the report (`threshold: 0.5`).
The input has a JSON object with a `text` a line, as generate.py writes it; those without text are left out. Without
--output the texts are only measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.atomic import write_atomic
from megatron.data.preprocess.text_scores import make_scorer
from megatron.errors import ConfigError, RunError
from megatron.output_streams import run_tool


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = argparse.ArgumentParser(description="Score texts and write those with the lowest scores.")
    result.add_argument("config", type=Path, help="YAML file that names the scorer")
    result.add_argument("--input", type=Path, required=True, help="JSON lines with a text each")
    result.add_argument("--output", type=Path, help="JSON lines to write")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        settings = _settings(args.config)
        share, threshold = _number(settings, "keep", 0.5, args.config), _number(settings, "threshold", 0.5, args.config)
        scorer = make_scorer(settings, str(args.config))
        texts = _read(args.input)
        scores = scorer(texts)
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    counted = sum(score >= threshold for score in scores)
    mean = sum(scores) / len(scores)
    print(
        f"{len(texts)} texts: mean score {mean:.4f}, {counted} ({counted / len(texts):.1%}) at {threshold:g} or above"
    )
    if args.output is not None:
        chosen = sorted(range(len(texts)), key=lambda index: scores[index])[: max(1, round(share * len(texts)))]
        lines = [json.dumps({"text": texts[index], "score": scores[index]}) for index in sorted(chosen)]
        write_atomic(args.output, "\n".join(lines) + "\n")
        print(f"{args.output}: the {len(chosen)} texts with the lowest scores")
    return 0


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError.of(f"cannot be read ({error.strerror})", key="config", value=str(path)) from error
    except yaml.YAMLError as error:
        raise ConfigError.of("this is no YAML", location=str(path), hint=str(error).splitlines()[0]) from error
    if not isinstance(found, dict):
        raise ConfigError.of("there are no keys", location=str(path), hint="write scorer: words, and words: FILE")
    return found


def _number(settings: dict[str, Any], key: str, default: float, path: Path) -> float:
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
        raise ConfigError.of("it is a number above 0, at most 1", key=key, value=value, location=str(path))
    return float(value)


def _read(path: Path) -> list[str]:
    """Returns the texts of JSON lines, without empty ones."""
    found = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    found.append(_text(line, f"{path}, line {number}"))
    except OSError as error:
        raise ConfigError.of(f"cannot be read ({error.strerror})", key="input", value=str(path)) from error
    texts = [text for text in found if text.strip()]
    if not texts:
        raise ConfigError.of("there is no text", key="input", value=str(path), hint="give what generate.py wrote")
    return texts


def _text(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError.of("no JSON object with a text", location=where, hint='write {"text": ...}') from error
    return text if isinstance(text, str) else ""


if __name__ == "__main__":
    sys.exit(run_tool(main))
