"""The data path beside other projects' tools: tokenising, then index maps and samples, one after the other.

    python benchmarks/data.py

benchmarks/tokenizing.py and benchmarks/sampling.py take flags and can be run alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sampling, tokenizing


def main() -> int:
    """1 when one of them misses what it promises."""
    code = tokenizing.main([])
    sampling.main()
    return code


if __name__ == "__main__":
    sys.exit(main())
