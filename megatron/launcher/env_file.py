"""The files of variables that DeepSpeed's runner hands to ranks on other hosts, checked before it reads them.

The runner takes every line as NAME=VALUE and writes the value between double quotes into a shell command.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron.errors import ConfigError, ConfigIssue

DEFAULT_NAME = ".deepspeed_env"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CHANGED = re.compile(r'["$`\\]')


def check_env_files(caller: Mapping[str, str], folder: Path) -> None:
    """Raises ConfigError for lines that the runner cannot read, and for values that a shell would change.

    Args:
        caller: The environment of deepy.py: HOME, and DS_ENV_FILE for another name of the files.
        folder: The folder in which the runner starts.
    """
    name = caller.get("DS_ENV_FILE", DEFAULT_NAME)
    folders = ([Path(caller["HOME"])] if caller.get("HOME") else []) + [folder]
    paths = dict.fromkeys(path.resolve() for each in folders if (path := each / name).is_file())
    ConfigError.raise_any([issue for path in paths for issue in _issues(path)])


def _issues(path: Path) -> Iterator[ConfigIssue]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        yield ConfigIssue(f"it cannot be read: {error}", location=str(path), hint="make it UTF-8 text of this user")
        return
    for number, line in enumerate(lines, 1):
        found, equals, value = line.partition("=")
        where = f"{path}, line {number}"
        if not equals or not _NAME.fullmatch(found):
            what = "DeepSpeed's runner takes every line as NAME=VALUE, comments and empty ones too"
            yield ConfigIssue(what, location=where, hint="take the line out")
        elif (changed := _CHANGED.search(value)) is not None:
            what = f"the value of {found} holds {changed.group()}, which the shell of a rank would change"
            yield ConfigIssue(what, location=where, hint="set it on the hosts themselves, or let a program read a file")
