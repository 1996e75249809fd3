"""Fields of configuration sections: `key` declares one, `Section` holds them.

`key(default, doc, unit=..., choices=...)` is a pydantic Field: the documentation, the unit and the choices are beside
the default and feed the key reference, the JSON Schema and the error messages. `Section` is a frozen model that
refuses unknown names and values of a wrong type.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron.registry import Registry


def key(
    default: Any,
    doc: str,
    *,
    unit: str | None = None,
    choices: tuple[str, ...] | Registry[Any] = (),
    planned: tuple[str, ...] = (),
) -> Any:
    """Declares one configuration key.

    Args:
        default: its value where none is given.
        doc: one sentence.
        unit: what a number counts, such as "steps" or "tokens".
        choices: the strings allowed, or the registry whose names are allowed.
        planned: names that are allowed although the registry has no such component yet.
    """
    extra: dict[str, Any] = {}
    if unit is not None:
        extra["unit"] = unit
    if choices:
        extra["choices"] = partial(_names, choices, planned)
    return Field(default=default, description=doc, json_schema_extra=extra or None)


def _names(choices: tuple[str, ...] | Registry[Any], planned: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the allowed names; plugins may have added components to the registry."""
    names = choices.names if isinstance(choices, Registry) else choices
    return names + tuple(name for name in planned if name not in names)


class Section(BaseModel):
    """The keys of one topic. Frozen: a changed value is a new section."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    choices: ClassVar[dict[str, Callable[[], tuple[str, ...]]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Collects the choices of every key once, when the section is defined."""
        cls.choices = {
            name: field.json_schema_extra["choices"]  # type: ignore[misc]
            for name, field in cls.model_fields.items()
            if isinstance(field.json_schema_extra, dict) and "choices" in field.json_schema_extra
        }

    @model_validator(mode="after")
    def _choices_hold(self) -> Self:
        for name, names in self.choices.items():
            choices, value = names(), getattr(self, name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, str) and item not in choices:
                    raise ValueError(f"{name} = {item!r} is not one of {', '.join(choices)}")
        return self
