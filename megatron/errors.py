"""The two kinds of error that a user sees, each told with what, where and what to do.

ConfigError: an error in what the user asked for, found before any work that it could waste (exit code 2).
RunError: an error met later, such as a damaged checkpoint, a full disk or a NaN loss (exit code 1).
Both carry one or more `ConfigIssue`s, so that every error is reported at once, one a line.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Self

INTERRUPTED = 130
"""The exit code of a process that Ctrl-C ended: 128 + SIGINT."""


class Unset(Enum):
    """Stands for "no value was involved", since None is a value that a configuration may hold."""

    UNSET = "unset"


UNSET = Unset.UNSET


@dataclass(frozen=True)
class ConfigIssue:
    """One thing that is wrong.

    what: the error, as a sentence without a full stop. key and value: the configuration key involved and what it
    held. where: `file:line`, "command line", a path or a rank. hint: what the user can do about it.
    """

    what: str
    key: str | None = None
    value: object = UNSET
    where: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        """`where: key = value: what; hint`, leaving out the parts that are not known."""
        subject = self.key
        if subject is not None and self.value is not UNSET:
            subject = f"{subject} = {self.value!r}"
        told = self.what if self.hint is None else f"{self.what}; {self.hint}"
        return ": ".join(part for part in (self.where, subject, told) if part)


class NeoxError(Exception):
    """A bundle of errors; the message is one line for each."""

    exit_code = 1

    def __init__(self, *issues: ConfigIssue) -> None:
        super().__init__("\n".join(str(issue) for issue in issues))
        self.issues = issues

    def __reduce__(self) -> tuple[type[Self], tuple[ConfigIssue, ...]]:
        """Pickling keeps the errors, which a worker process may have to hand over."""
        return type(self), self.issues

    @classmethod
    def of(
        cls,
        what: str,
        *,
        key: str | None = None,
        value: object = UNSET,
        where: str | None = None,
        hint: str | None = None,
    ) -> Self:
        """The common case of a single error."""
        return cls(ConfigIssue(what, key, value, where, hint))

    @classmethod
    def raise_any(cls, issues: Iterable[ConfigIssue]) -> None:
        """Raises one error that holds all the errors, if there are any."""
        found = tuple(issues)
        if found:
            raise cls(*found)


class ConfigError(NeoxError):
    """The user asked for something that cannot be, said before any work starts."""

    exit_code = 2


class RunError(NeoxError):
    """Something failed while the work was under way; what was already written stays usable."""
