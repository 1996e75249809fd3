"""Cut the documents of one data set into train, validation and test: contiguous ranges, in file order."""

from __future__ import annotations

from megatron.errors import ConfigError

NAMES = ("train", "valid", "test")


def split_shares(split: str) -> tuple[float, float, float]:
    """The share of each split [fraction] from "969, 30, 1" or "90/5/5"; shares left out are 0. Raises ConfigError."""
    parts = [part.strip() for part in split.replace("/", ",").split(",")]
    try:
        numbers = [float(part) for part in parts if part]
    except ValueError as error:
        raise _refused(split, "it holds something that is not a number") from error
    if not 1 <= len(numbers) <= len(NAMES):
        raise _refused(split, f"it has {len(numbers)} numbers")
    if not all(0 <= number < float("inf") for number in numbers) or not sum(numbers) > 0:
        raise _refused(split, "its numbers must be 0 or more, and one of them above 0")
    total = sum(numbers)
    train, valid, test = [number / total for number in numbers] + [0.0] * (len(NAMES) - len(numbers))
    return train, valid, test


def split_documents(split: str, documents: int) -> dict[str, range]:
    """The documents of each split. Each share is rounded by itself, and the surplus is taken from the first.

    Raises ConfigError when the split cannot be read.
    """
    bounds = [0]
    for share in split_shares(split):
        bounds.append(bounds[-1] + round(share * float(documents)))
    surplus = bounds[-1] - documents
    bounds = [0] + [max(0, bound - surplus) for bound in bounds[1:]]
    return {name: range(first, last) for name, first, last in zip(NAMES, bounds, bounds[1:], strict=False)}


def _refused(split: str, what: str) -> ConfigError:
    hint = "give the shares of train, validation and test, such as 969, 30, 1"
    return ConfigError.of(f"this is not a split: {what}", key="split", value=split, hint=hint)
