"""What all dataclasses of settings share: checks of their values, and conversion to and from JSON."""

import json
import re
from dataclasses import asdict
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from dq_lightning.core.errors import ConfigError, StoreError


def check_choice(owner: str, name: str, value: object, choices: Any) -> None:
    """Raise ConfigError unless `value` is one of the Literal type `choices`."""
    if value not in get_args(choices):
        raise ConfigError(f"{owner}.{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def check_ratio(owner: str, name: str, value: float, *, zero: bool = False) -> None:
    """Raise ConfigError unless 0 < value <= 1 (0 <= value < 1 with `zero`)."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ConfigError(f"{owner}.{name} must be a number, got {value!r}")
    inside = (0 <= value < 1) if zero else (0 < value <= 1)
    if not inside:
        hint = f"; {value:g} % is {value / 100:g}" if 1 < value <= 100 else ""
        raise ConfigError(f"{owner}.{name} must be in {'[0, 1)' if zero else '(0, 1]'}, got {value!r}{hint}")


def address_scheme(path: str | Path | None) -> str | None:
    """Return the scheme of an address, or None for a path of this machine.

    Example:
        >>> address_scheme("s3://bucket/set"), address_scheme("C:/sets"), address_scheme("sets/a:b")
        ('s3', None, None)
    """
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+(?=:/)", str(path or ""))
    return None if scheme is None else scheme[0]


def check_local(name: str, path: str | Path | None) -> None:
    """Raise ConfigError if a path is an address such as `s3://...`.

    Without this check it would be written to a local folder of that name below the working directory.
    """
    scheme = address_scheme(path)
    if scheme is not None:
        advice = "leave out file: and the slashes after it" if scheme == "file" else "mount it, and pass that folder"
        raise ConfigError(
            f"{name}={str(path)!r} is an address, and only folders of this machine can be written: {advice}"
        )


def check_no_address(folder: str | Path) -> None:
    """Raise StoreError if the folder of a compact set is an address such as `s3://...`."""
    if address_scheme(folder) is not None:
        raise StoreError(
            f"{folder} is an address, and this opens folders of this machine: QuantizedDataModule.from_store copies a compact "
            "set from an address, and its info.path is the copy"
        )


def _hints(kind: type) -> dict[str, Any]:
    fields = getattr(kind, "__dataclass_fields__", {})
    return {name: hint for name, hint in get_type_hints(kind).items() if name in fields}


# The types of plain fields, as errors name them.
_KINDS: dict[type, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    NoneType: "None",
}


class JsonFields:
    """Base of nested frozen dataclasses that convert to and from JSON; unknown fields are errors."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    # Arguments of `quantize` and `QuantizedDataModule` that take what is no string, by the field that names it.
    _taken_elsewhere: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        """Check choices, and convert values to the types of their fields, so that 1 and NumPy's 1 are the same setting.

        Raises:
            ConfigError: a field of a Literal type has another value.
        """
        for name, hint in _hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal:
                check_choice(type(self).__name__, name, value, hint)
            kinds = get_args(hint) or (hint,)
            if isinstance(value, bool) or (
                getattr(getattr(value, "dtype", None), "kind", "") == "b" and value.ndim == 0
            ):
                object.__setattr__(self, name, bool(value))
            elif float in kinds and isinstance(value, Real):
                object.__setattr__(self, name, float(value))
            elif int in kinds and isinstance(value, Integral):
                object.__setattr__(self, name, int(value))
            elif str in kinds and isinstance(value, str | PathLike):
                object.__setattr__(self, name, str(value))
            elif isinstance(value, list | tuple):
                number: Any = int if tuple[int, ...] in kinds else float
                object.__setattr__(self, name, tuple(number(v) if isinstance(v, Real) else v for v in value))
            self._check_kind(name, hint)

    def _check_kind(self, name: str, hint: Any) -> None:
        """Raise ConfigError if a field of numbers, strings, or true and false holds something else."""
        value, kinds = getattr(self, name), set(get_args(hint) or (hint,))
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        plain = {kind for kind in kinds if get_origin(kind) is not Literal}
        if get_origin(hint) is Literal or not plain <= _KINDS.keys() or value in choices:
            return
        # True and False are whole numbers to Python.
        if type(value) not in plain:
            wanted = [_KINDS[kind] for kind in _KINDS if kind in plain and not (kind is int and float in plain)]
            self._require(name, False, " or ".join([*map(repr, choices), *wanted]))

    def _require(self, name: str, good: bool, allowed: str) -> None:
        """Raise ConfigError unless the value of a field is good; `allowed` completes "it must be ..."."""
        if not good:
            value, argument = getattr(self, name), self._taken_elsewhere.get(name)
            shown = " ".join(repr(value).split())
            where = f"; pass it as {argument}=" if argument and not isinstance(value, str) else ""
            raise ConfigError(f"{type(self).__name__}.{name} must be {allowed}, got {shown:.60}{where}")

    def _require_at_least(self, **smallest: int) -> None:
        """Raise ConfigError if a named field has a smaller value; a field whose default is None may be None."""
        for name, number in smallest.items():
            value, optional = getattr(self, name), self.__dataclass_fields__[name].default is None
            if not (optional and value is None):
                self._require(name, value >= number, f"at least {number}{' or None' if optional else ''}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as nested dicts, lists and scalars, which JSON can hold."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def to_json(self) -> str:
        """Return the fields as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Make the settings from a dict; this inverts `to_dict`.

        Args:
            values: values by field name; fields that are missing get their defaults.

        Raises:
            ConfigError: `values` is not a dict, a field is unknown, or a value is invalid.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{cls.__name__} is made from a dict of its fields, got {values!r:.80}")
        hints = _hints(cls)
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise ConfigError(f"{cls.__name__} has no field {', '.join(unknown)}; its fields are {known}")
        made = {}
        for name, value in values.items():
            hint = hints[name]
            if isinstance(hint, type) and issubclass(hint, JsonFields) and isinstance(value, dict):
                value = hint.from_dict(value)
            elif isinstance(hint, type) and issubclass(hint, JsonFields) and not isinstance(value, hint):
                raise ConfigError(f"{cls.__name__}.{name} must be a mapping of its fields, got {value!r}")
            elif isinstance(value, list):
                value = tuple(value)
            made[name] = value
        return cls(**made)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Make the settings from JSON text; this inverts `to_json`.

        Raises:
            ConfigError: a field is unknown, or a value is invalid.
            json.JSONDecodeError: the text is not JSON.
        """
        return cls.from_dict(json.loads(text))
