"""User-facing errors: each carries a message, its location and a hint.

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
    """Means "no value was involved", since None is a value that a configuration may hold."""

    UNSET = "unset"


UNSET = Unset.UNSET


@dataclass(frozen=True)
class ConfigIssue:
    """One thing that is wrong."""

    message: str
    """The error, as a sentence without a full stop."""
    key: str | None = None
    """The configuration key involved."""
    value: object = UNSET
    """The value of that key."""
    location: str | None = None
    """`file:line`, "command line", a path or a rank."""
    hint: str | None = None
    """What the user can do about it."""

    def __str__(self) -> str:
        """Formats `location: key = value: message; hint`, without the fields that are not set."""
        subject = self.key
        if subject is not None and self.value is not UNSET:
            subject = f"{subject} = {self.value!r}"
        message = self.message if self.hint is None else f"{self.message}; {self.hint}"
        return ": ".join(part for part in (self.location, subject, message) if part)


class NeoxError(Exception):
    """A bundle of issues; the message has one line for each."""

    exit_code = 1

    def __init__(self, *issues: ConfigIssue) -> None:
        super().__init__("\n".join(str(issue) for issue in issues))
        self.issues = issues

    def __reduce__(self) -> tuple[type[Self], tuple[ConfigIssue, ...]]:
        """Keeps the issues when the error is pickled across processes."""
        return type(self), self.issues

    @classmethod
    def of(
        cls,
        message: str,
        *,
        key: str | None = None,
        value: object = UNSET,
        location: str | None = None,
        hint: str | None = None,
    ) -> Self:
        """Makes an error of one issue.

        Args:
            message: see `ConfigIssue`.
            key: the configuration key involved.
            value: its value.
            location: `file:line`, "command line", a path or a rank.
            hint: what the user can do.
        """
        return cls(ConfigIssue(message, key, value, location, hint))

    @classmethod
    def raise_any(cls, issues: Iterable[ConfigIssue]) -> None:
        """Raises one error that holds all issues, if there are any."""
        found = tuple(issues)
        if found:
            raise cls(*found)


class ConfigError(NeoxError):
    """The configuration or the command line asks for something impossible; raised before any work starts."""

    exit_code = 2


class RunError(NeoxError):
    """The work failed while it was under way; what was already written stays usable."""
