"""Configuration values while derived ones are filled in."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from megatron.config.cluster import Resources
from megatron.config.validation.unknown_values import UnresolvedValue
from megatron.errors import ConfigIssue

DERIVED_ONLY = {
    "is_pipe_parallel": "pipe_parallel_size",
    "zero_stage": "zero_optimization",
    "zero_reduce_scatter": "zero_optimization",
    "zero_contiguous_gradients": "zero_optimization",
    "zero_reduce_bucket_size": "zero_optimization",
    "zero_allgather_bucket_size": "zero_optimization",
    "dynamic_loss_scale": "loss_scale",
    "mup_base_widths": "base_shapes_file",
}
"""Output keys -> the key that decides them. Giving them another value is an error."""


@dataclass
class ConfigDraft:
    """Configuration values while defaults are filled in."""

    values: dict[str, Any]
    """Every key and its value."""
    given: Collection[str]
    """The keys that the user wrote."""
    resources: Resources | None
    """Resources of the cluster; None where they could not be found."""
    unknown: set[str] = field(default_factory=set)
    """Keys whose value is invalid or follows from an invalid one; reading one raises UnresolvedValue."""
    derived: set[str] = field(default_factory=set)
    """Keys whose value was derived."""
    settled: set[str] = field(default_factory=set)
    """Keys that the current derivation has set."""
    issues: list[ConfigIssue] = field(default_factory=list)
    """Errors found so far."""
    warnings: list[str] = field(default_factory=list)
    """Warnings found so far."""

    def __getitem__(self, name: str) -> Any:
        if name in self.unknown:
            raise UnresolvedValue(name)
        return self.values[name]

    def knows(self, *names: str) -> bool:
        """Returns whether all these values are known."""
        return self.unknown.isdisjoint(names)

    def derive(self, name: str, value: Any) -> None:
        """Sets a derived value; an unchanged value keeps its origin."""
        before = self.values[name]
        if name in DERIVED_ONLY and name in self.given and self.knows(name) and before not in (None, value):
            what, hint = (
                f"this follows from {DERIVED_ONLY[name]}, which makes it {value!r}",
                f"set {DERIVED_ONLY[name]} instead",
            )
            self.issues.append(ConfigIssue(what, key=name, value=before, hint=hint))
        if before != value or type(before) is not type(value):
            self.values[name] = value
            self.derived.add(name)
        self.settled.add(name)
        self.unknown.discard(name)

    def user(self, name: str) -> Any:
        """Returns the user's value of the key, or None."""
        return self[name] if name in self.given else None

    def refuse(self, *issues: ConfigIssue) -> None:
        """Records errors; the values of their keys become unknown."""
        self.issues += issues
        self.unknown |= {issue.key for issue in issues if issue.key is not None}
