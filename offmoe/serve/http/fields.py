"""The members of a request's body, once the body has been checked. What no API defines is ignored and named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from offmoe.serve.http.shape import Schema, check

Kind = TypeVar("Kind")


class Fields:
    """A JSON object of a body.

    Args:
        values: The object.
        where: Path of the object in the request, for messages; "" for the request itself.
        shape: What it may hold; None: the body that it is a part of has been checked.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "", shape: Schema | None = None):
        self._values, self._where = values, where
        self._shape: Schema = {} if shape is None else shape

    @classmethod
    def checked(cls, body: Any, shape: Schema, dotted: bool = False) -> Fields:
        """The members of a whole body.

        Args:
            body: The body.
            shape: What it may be.
            dotted: Whether messages write a path as Anthropic does.

        Raises:
            RequestError: It is something else. The message names the first member that is wrong.
        """
        check(shape, body, dotted)
        return cls(body, "", shape)

    def path(self, name: str) -> str:
        """Path of a member, as messages name it."""
        return f"{self._where}.{name}" if self._where else name

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def any(self, name: str) -> Any:
        """A member of any type; None if it is absent or null."""
        return self._values.get(name)

    def get(self, name: str, kind: type[Kind], default: Kind | None = None) -> Kind | None:
        """A member of a type; `default` if it is absent or null. 3.0 becomes 3 where an integer is due."""
        value = self._values.get(name)
        if value is None:
            return default
        if kind is int and isinstance(value, float):
            value = int(value)
        assert isinstance(value, kind), self.path(name)
        return value

    def number(self, name: str) -> float | None:
        """A number."""
        value = self._values.get(name)
        return None if value is None else float(value)

    def need(self, name: str, kind: type[Kind], default: Kind | None = None) -> Kind:
        """A member that has to be there, or has a default."""
        return cast("Kind", self.get(name, kind, default))

    def inner(self, name: str) -> Fields:
        """The members of an object; none if it is absent or null."""
        return Fields(self._values.get(name) or {}, self.path(name), self._shape.get("properties", {}).get(name))

    def ignored(self) -> list[str]:
        """Names of members that the shape does not know."""
        known = self._shape.get("properties", {})
        return [self.path(name) for name in self._values if name not in known]


def tokens_limit(fields: Fields, *names: str) -> int | None:
    """The most tokens of an answer, by the first of these members that is there; null and -1: no limit of its own."""
    found = next((fields.get(name, int) for name in names if name in fields), None)
    return None if found == -1 else found


def strings(fields: Fields, name: str) -> tuple[str, ...]:
    """A string or an array of strings; () if it is absent."""
    value: Any = fields.any(name)
    return (value,) if isinstance(value, str) else tuple(value or ())
