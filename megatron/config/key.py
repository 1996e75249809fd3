"""How a section states a key, and what every section shares.

`key(default, doc, unit=..., choices=...)` is a pydantic Field: the documentation, the unit and the choices stand beside
the default and feed the key reference, the JSON Schema and the error messages. `Section` is a frozen model that
refuses unknown names and values of a wrong type.
"""

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


def key(default: Any, doc: str, *, unit: str | None = None, choices: tuple[str, ...] = ()) -> Any:
    """One configuration key.

    doc: one sentence. unit: what a number counts, such as "steps" or "tokens". choices: the strings allowed.
    """
    extra: dict[str, Any] = {}
    if unit is not None:
        extra["unit"] = unit
    if choices:
        extra["choices"] = list(choices)
    return Field(default=default, description=doc, json_schema_extra=extra or None)


def planned(built: tuple[str, ...], *further: str) -> tuple[str, ...]:
    """The choices of a registry family and those that configurations may name although no part is built yet."""
    return built + tuple(name for name in further if name not in built)


class Section(BaseModel):
    """The keys of one topic. Frozen: a changed value is a new section."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    choices: ClassVar[dict[str, tuple[str, ...]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Collects the choices of every key once, when the section is defined."""
        cls.choices = {
            name: tuple(field.json_schema_extra["choices"])  # type: ignore[arg-type]
            for name, field in cls.model_fields.items()
            if isinstance(field.json_schema_extra, dict) and "choices" in field.json_schema_extra
        }

    @model_validator(mode="after")
    def _choices_hold(self) -> Self:
        for name, choices in self.choices.items():
            value = getattr(self, name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, str) and item not in choices:
                    raise ValueError(f"{name} = {item!r} is not one of {', '.join(choices)}")
        return self
