"""What the settings share: checks of their values, and JSON in both directions."""

import json
from dataclasses import asdict
from typing import Any, ClassVar, Self, get_args, get_type_hints

from dq_lightning.errors import ConfigError


def check_choice(owner: str, name: str, value: object, choices: Any) -> None:
    """Raise ConfigError unless `value` is one of the Literal type `choices`."""
    if value not in get_args(choices):
        raise ConfigError(f"{owner}.{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def check_ratio(owner: str, name: str, value: float, *, zero: bool = False) -> None:
    """Raise ConfigError unless 0 < value <= 1 (0 <= value < 1 with `zero`)."""
    inside = (0 <= value < 1) if zero else (0 < value <= 1)
    if not inside:
        hint = f"; {value:g} % is {value / 100:g}" if 1 < value <= 100 else ""
        raise ConfigError(f"{owner}.{name} must be in {'[0, 1)' if zero else '(0, 1]'}, got {value!r}{hint}")


class JsonFields:
    """JSON in both directions for nested frozen dataclasses; unknown fields are errors."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, lists and scalars."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def to_json(self) -> str:
        """Indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a field is unknown or its value invalid.
        """
        hints = get_type_hints(cls)
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise ConfigError(f"{cls.__name__} has no field {', '.join(unknown)}; its fields are {known}")
        made = {}
        for name, value in values.items():
            hint = hints[name]
            if isinstance(hint, type) and issubclass(hint, JsonFields) and isinstance(value, dict):
                value = hint.from_dict(value)
            elif isinstance(value, list):
                value = tuple(value)
            made[name] = value
        return cls(**made)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))
