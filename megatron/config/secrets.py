"""Keys that are secrets, and texts and command lines without them.

A secret stays in the file that the workers of a run read, and goes nowhere else: not into checkpoints and their copies,
results files, metrics services or the record of launches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

SECRETS = frozenset({"serve_key"})
"""Keys whose values are secrets."""
REDACTED = "(redacted)"
"""Shown in place of a value."""
_NAMES = "|".join(name.replace("_", "[-_]") for name in sorted(SECRETS))
_LINE = re.compile(rf"""^(.*(?:{_NAMES})["']?\s*:\s*)("[^"]*"|'[^']*'|[^\s,}}#]+)""", re.MULTILINE)
_FLAG = re.compile(rf"--(?:{_NAMES})(=.*)?", re.DOTALL)


def text_without_secrets(text: str) -> str:
    """The text of a configuration file with null as the value of each secret key.

    Args:
        text: YAML or JSON.
    """
    return _LINE.sub(r"\1null", text)


def arguments_without_secrets(arguments: Iterable[str]) -> list[str]:
    """A command line with `(redacted)` as the value of each secret flag.

    Args:
        arguments: Its words.
    """
    shown: list[str] = []
    follows = False
    for word in arguments:
        flag = _FLAG.fullmatch(word)
        if follows and flag is None:
            word = REDACTED
        elif flag is not None and flag[1] is not None:
            word = f"{word.partition('=')[0]}={REDACTED}"
        follows = flag is not None and flag[1] is None
        shown.append(word)
    return shown
