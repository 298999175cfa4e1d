"""The fields of a request: each is read, harmless, or refused by name. What no API defines is ignored and named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from offmoe.dialogue.errors import RequestError

Kind = TypeVar("Kind")


class Fields:
    """The members of a JSON object, taken one after the other.

    Args:
        values: The object.
        where: Path of the object in the request, for messages; "" for the request itself.
    """

    def __init__(self, values: Any, where: str = ""):
        if not isinstance(values, dict):
            raise RequestError(f"{where or 'the body'} has to be a JSON object.", where or None)
        self._values: dict[str, Any] = values
        self._left = dict.fromkeys(values)
        self._where = where

    def path(self, name: str) -> str:
        """Path of a member, as messages name it."""
        return f"{self._where}.{name}" if self._where else name

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def any(self, name: str) -> Any:
        """A member of any type; None if it is absent or null."""
        self._left.pop(name, None)
        return self._values.get(name)

    def get(self, name: str, kind: type[Kind] | tuple[type[Kind], ...], default: Kind | None = None) -> Kind | None:
        """A member of a type; `default` if it is absent or null. RequestError if it has another type."""
        value = self.any(name)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        is_bool = isinstance(value, bool)
        if (is_bool and bool not in kinds) or not isinstance(value, kinds):
            raise RequestError(f"{self.path(name)} has to be {_names(kinds)}.", self.path(name))
        return value

    def number(self, name: str) -> float | None:
        """A number."""
        value: Any = self.get(name, (int, float))
        return None if value is None else float(value)

    def need(self, name: str, kind: type[Kind] | tuple[type[Kind], ...]) -> Kind:
        """A member that has to be there."""
        value = self.get(name, kind)
        if value is None:
            raise RequestError(f"{self.path(name)} is missing.", self.path(name))
        return value

    def harmless(self, *names: str) -> None:
        """Accept members that cannot change the answer."""
        for name in names:
            self._left.pop(name, None)

    def refuse(self, reasons: Mapping[str, str], unless: Iterable[Any] = (None, False, [], {}, "")) -> None:
        """RequestError for a member that cannot be honored, unless its value asks for nothing.

        Args:
            reasons: Name of the member -> what to do instead.
            unless: Values that ask for nothing.
        """
        for name, reason in reasons.items():
            value = self.any(name)
            if not any(value is free or value == free for free in unless):
                raise RequestError(f"{self.path(name)}: {reason}", self.path(name))

    def ignored(self) -> list[str]:
        """Names of members that nothing has read."""
        return [self.path(name) for name in self._left]


def _names(kinds: tuple[type, ...]) -> str:
    words = {str: "a string", int: "an integer", float: "a number", bool: "true or false", list: "an array"}
    return " or ".join(dict.fromkeys(words.get(kind, "an object") for kind in kinds))


def tokens_limit(fields: Fields, *names: str) -> int | None:
    """The most tokens of an answer, by the first of these members that is there; null and -1: no limit of its own."""
    found = None
    for name in names:
        value = fields.get(name, int)
        if value is not None and found is None:
            if value != -1 and value < 1:
                raise RequestError(f"{fields.path(name)} is {value}; it has to be at least 1.", fields.path(name))
            found = value
    return None if found == -1 else found


def strings(fields: Fields, name: str) -> tuple[str, ...]:
    """A string or an array of strings; () if it is absent."""
    value: Any = fields.get(name, (str, list))
    if isinstance(value, str):
        value = [value]
    if any(not isinstance(item, str) for item in value or ()):
        raise RequestError(f"{fields.path(name)} has to be a string or an array of strings.", fields.path(name))
    return tuple(value or ())
