#!/usr/bin/env python
"""Client of a text service for the terminal: python tools/text_generation_cli.py HOST:PORT [--tokens 64]."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence


def answer(address: str, body: dict[str, object], key: str | None) -> Iterator[str]:
    """Yields the text of a completion as it arrives.

    Raises OSError, also urllib's HTTPError, and RuntimeError where the model fails meanwhile.

    address: HOST:PORT. body: of the request. key: for the Authorization header, or None.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(
        f"http://{address}/v1/completions", json.dumps({**body, "stream": True}).encode(), headers, method="POST"
    )
    with urllib.request.urlopen(request) as response:
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if data and data != "[DONE]":
                event = json.loads(data)
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                yield from (choice["text"] for choice in event["choices"])


def main(arguments: Sequence[str]) -> int:
    """Reads one prompt per line and prints its completion, until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--tokens", type=int, default=64, help="most new tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--key", default=os.environ.get("NEOX_SERVE_KEY"), help="default: $NEOX_SERVE_KEY")
    args = parser.parse_args(arguments)
    while True:
        try:
            prompt = input("prompt> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return 0
        if not prompt.strip():
            continue
        body: dict[str, object] = {"prompt": prompt, "max_tokens": args.tokens, "temperature": args.temperature}
        try:
            for text in answer(args.address, body, args.key):
                print(text, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print()  # the closed connection aborts the request
        except urllib.error.HTTPError as error:
            print(f"{args.address} answers {error.code}: {json.load(error)['error']['message']}", file=sys.stderr)
        except RuntimeError as error:
            print(f"\n{args.address} could not go on: {error}", file=sys.stderr)
        except OSError as error:
            print(f"cannot reach {args.address}: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")  # characters that the terminal's encoding lacks
    sys.exit(main(sys.argv[1:]))
