"""The shipped configurations: their names, and what each is meant to run on."""

import re
from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted([*CONFIGS.glob("**/*.yml"), *CONFIGS.glob("*/*.json")])


def name_of(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


def intended(path: Path) -> tuple[int, list[Path]]:
    """The ranks that the file's comment names, and the files it is merged with."""
    text = path.read_text(encoding="utf-8")
    ranks = re.search(r"Ranks:[\s#]+(\d+)", text)
    partner = re.search(r"With:[\s#]+(\S+)", text)
    return int(ranks[1]) if ranks else 2, [path, *([CONFIGS / partner[1]] if partner else [])]
