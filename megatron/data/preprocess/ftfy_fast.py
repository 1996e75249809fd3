"""Fix broken Unicode with the package `ftfy`, without its cost where there is nothing to fix.

`ftfy.fix_text` looks at a text line by line, and at most lines for nothing. Here a text that none of its steps would
change is recognised by a few searches, and returned unchanged; where curly quotes alone are to be made straight, that
is done here; every other line is handed to ftfy. The result is that of `ftfy.fix_text`, character for character.

A step of ftfy changes a text only where it holds: an HTML entity; characters that look like a wrong encoding beside one
another (`ftfy.badness`); a control character, a line break other than a newline, a ligature, a wide or narrow form, a
curly quote, a surrogate; or what NFC composes. The searches are made of ftfy's own tables.

Source: https://ftfy.readthedocs.io, version 6.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

from megatron.errors import ConfigError

_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
_CONTROL = bytes([*range(0x09), 0x0B, *range(0x0D, 0x20), 0x7F])  # of ASCII, what vanishes or becomes a newline
_LINE_BREAKS = "\r\x85\u2028\u2029"
_SURROGATES = "\ud800-\udfff"
_C1 = "\x80-\x9f"
# Every sign of a wrong encoding holds a character beyond ASCII and at most _BESIDE of ASCII before or behind it. One of
# them is bound to the start of a line.
_BEYOND_ASCII = re.compile("[^\x00-\x7f]+(?:[\x00-\x7f]{1,8}[^\x00-\x7f]+)*")
_BESIDE = 4
_LINE_STARTS = re.compile("\n[\u00c3\u00c2] ")


def mended(text: str) -> str:
    """What ftfy.fix_text makes of a text. Raises ConfigError when ftfy is not installed."""
    return _mender().fix(text)


class _Mender:
    """ftfy and the searches made of its tables."""

    def __init__(self) -> None:
        try:
            ftfy = importlib.import_module("ftfy")
        except ModuleNotFoundError as error:
            raise ConfigError.of(
                "mending Unicode needs the package ftfy, which is not installed", key="ftfy", hint="pip install ftfy"
            ) from error
        tables = importlib.import_module("ftfy.chardata")
        self._fix_line: Callable[..., tuple[str, object]] = ftfy.fix_and_explain
        self._config = ftfy.TextFixerConfig(explain=False)
        self._bad: re.Pattern[str] = importlib.import_module("ftfy.badness").BADNESS_RE
        self._double, self._single = tables.DOUBLE_QUOTE_RE, tables.SINGLE_QUOTE_RE
        changed = {chr(code) for table in (tables.LIGATURES, tables.WIDTH_MAP, tables.CONTROL_CHARS) for code in table}
        listed = "".join(map(re.escape, sorted(changed)))
        self._changed = re.compile(f"[{listed}{_LINE_BREAKS}{_SURROGATES}{_C1}]")

    def fix(self, text: str) -> str:
        """The text fixed: at once, or line by line."""
        quick = self._quick(text)
        if quick is not None:
            return quick
        config, fixed = self._config, []
        start = 0
        while start < len(text):
            end = text.find("\n", start) + 1 or len(text)
            end = min(end, start + config.max_decode_length)
            line = text[start:end]
            # Once a text has shown a tag, its entities are meant.
            if config.unescape_html == "auto" and "<" in line:
                config = config._replace(unescape_html=False)
            quick = self._quick(line)
            fixed.append(self._fix_line(line, config)[0] if quick is None else quick)
            start = end
        return "".join(fixed)

    def _quick(self, text: str) -> str | None:
        """The text fixed, where at most its quotes are to be made straight; else None."""
        if "&" in text and _ENTITY.search(text) is not None:
            return None
        if text.isascii():
            content = text.encode()
            return text if len(content.translate(None, _CONTROL)) == len(content) else None
        if not self._keeps(text):
            return None
        straight = self._single.sub("'", self._double.sub('"', text))
        return straight if straight == text or straight.isascii() or self._keeps(straight) else None

    def _keeps(self, text: str) -> bool:
        """Whether no step but that of the quotes changes the text, which spells no entity."""
        return (
            self._changed.search(text) is None
            and unicodedata.is_normalized("NFC", text)
            and _LINE_STARTS.search(text) is None
            and not any(
                self._bad.search(text, max(match.start() - _BESIDE, 0), match.end() + _BESIDE)
                for match in _BEYOND_ASCII.finditer(text)
            )
        )


@lru_cache(maxsize=1)
def _mender() -> _Mender:
    return _Mender()
