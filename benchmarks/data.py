"""The data path beside other projects' tools: tokenising, then index maps and samples, one after the other.

    python benchmarks/data.py [--rounds 2]

benchmarks/tokenizing.py and benchmarks/sampling.py take flags and can be run alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sampling, tokenizing


def main(arguments: list[str] | None = None) -> int:
    """1 when one of them misses what it promises."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--rounds", type=int, default=2, help="turns of each side")
    rounds = ["--rounds", str(made.parse_args(arguments).rounds)]
    return max(tokenizing.main(rounds), sampling.main(rounds))


if __name__ == "__main__":
    sys.exit(main())
