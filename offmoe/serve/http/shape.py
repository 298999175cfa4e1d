"""What JSON a request may hold: schemas in the words of JSON Schema, and the check of a value against one.

The server's OpenAPI document holds the same schemas, so it accepts what the check accepts, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offmoe.dialogue.errors import RequestError

Schema = Mapping[str, Any]
Path = tuple[str | int, ...]

ANY: Schema = {}
STRING: Schema = {"type": "string"}
BOOL: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
"""Values that ask for nothing."""
_WORDS = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "array": "an array",
    "object": "a JSON object",
}
_KINDS: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
    "number": lambda value: _is_number(value),
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def integer(low: int | None = None, high: int | None = None) -> Schema:
    """An integer from `low` to `high`. As in JSON Schema, 1.0 is one."""
    return _bounded("integer", low, high)


def number(low: float, high: float) -> Schema:
    """A number from `low` to `high`."""
    return _bounded("number", low, high)


def array(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    """An array of `least` to `most` items."""
    found: dict[str, Any] = {"type": "array", "items": items}
    if least:
        found["minItems"] = least
    if most is not None:
        found["maxItems"] = most
    return found


def members(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None, **more: Schema) -> Schema:
    """An object. Members that are not required may be null, which means the same as absent. Others may be there too.

    Args:
        required: Members that have to be there. What tells an object from others, such as "type", comes first.
        optional: Members that need not.
        more: More of these.
    """
    properties = {**required, **{name: _or_null(schema) for name, schema in {**(optional or {}), **more}.items()}}
    found: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        found["required"] = list(required)
    return found


def one_of(*values: Any) -> Schema:
    """One of a few values."""
    return {"enum": list(values)}


def other_than(*values: str) -> Schema:
    """Any string but these."""
    return {"type": "string", "not": {"enum": list(values)}}


def either(*schemas: Schema, reason: str | None = None) -> Schema:
    """A value of one of several schemas. reason: what a message says of a value of no known kind."""
    found: dict[str, Any] = {"anyOf": list(schemas)}
    return found if reason is None else {**found, "description": reason}


def refused(reason: str) -> Schema:
    """A member that cannot be honored: only values that ask for nothing pass. reason: what to do instead."""
    return {"enum": list(_NOTHING), "description": reason}


def check(schema: Schema, value: Any, dotted: bool = False) -> None:
    """Check a request's body.

    Args:
        schema: What it may be.
        value: The body.
        dotted: Whether a path is written as a.0.b, which is Anthropic's way, not a[0].b.

    Raises:
        RequestError: One sentence about the first member that is wrong, with its path.
    """
    fault = _fault(schema, value, ())
    if fault is None:
        return
    path = _written(fault.path, dotted)
    raise RequestError(f"{path or 'the body'}{fault.says()}", path or None)


@dataclass(frozen=True)
class _Fault:
    """What is wrong with a value.

    path: where. wanted: what it has to be. sentence: says it instead. is_choice: it is another than a few known values.
    """

    path: Path
    wanted: tuple[str, ...] = ()
    sentence: str = ""
    is_choice: bool = False

    def says(self) -> str:
        *first, last = self.wanted or ("",)
        return self.sentence or f" has to be {', '.join(first)}{' or ' if first else ''}{last}."


def _fault(schema: Schema, value: Any, path: Path) -> _Fault | None:
    """The first fault of a value."""
    if "anyOf" in schema:
        return _fault_of_all(schema, value, path)
    return next((fault for find in _CHECKS for fault in find(schema, value, path)), None)


def _fault_of_all(schema: Schema, value: Any, path: Path) -> _Fault | None:
    """The fault of the alternative that a value comes nearest to; None: it is one of them."""
    faults = []
    for alternative in schema["anyOf"]:
        fault = _fault(alternative, value, path)
        if fault is None:
            return None
        faults.append(fault)
    nearest = max(faults, key=lambda fault: (len(fault.path), not fault.is_choice))
    if "description" in schema and (nearest.is_choice or nearest.path == path):
        kind = value.get("type") if isinstance(value, dict) else None
        return _Fault(path, sentence=f": {schema['description']}{f', not {kind!r}' if kind else ''}.")
    if nearest.sentence:
        return nearest
    same = [fault for fault in faults if fault.path == nearest.path and fault.is_choice == nearest.is_choice]
    if nearest.path == path:
        same = [fault for fault in faults if fault.path == path]
    wanted = dict.fromkeys(word for fault in same for word in fault.wanted)
    return next((fault for fault in same if fault.sentence), _Fault(nearest.path, tuple(wanted)))


def _wrong_value(schema: Schema, value: Any, path: Path) -> Iterator[_Fault]:
    if "enum" in schema and not any(_same(value, known) for known in schema["enum"]):
        if "description" in schema:
            yield _Fault(path, sentence=f": {schema['description']}", is_choice=True)
        yield _Fault(path, tuple(repr(known) for known in schema["enum"] if known is not None), is_choice=True)
    if "not" in schema and any(_same(value, known) for known in schema["not"]["enum"]):
        yield _Fault(path, (f"other than {value!r}",), is_choice=True)


def _wrong_kind(schema: Schema, value: Any, path: Path) -> Iterator[_Fault]:
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_KINDS[kind](value) for kind in kinds):
        yield _Fault(path, tuple(_WORDS[kind] for kind in kinds if kind != "null"))


def _wrong_size(schema: Schema, value: Any, path: Path) -> Iterator[_Fault]:
    if _is_number(value):
        low, high = schema.get("minimum"), schema.get("maximum")
        if (low is not None and value < low) or (high is not None and value > high):
            span = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
            yield _Fault(path, sentence=f" is {value}; it has to be {span}.")
    elif isinstance(value, list):
        least, most = schema.get("minItems", 0), schema.get("maxItems", len(value))
        if not least <= len(value) <= most:
            span = f"at least {least}" if len(value) < least else f"at most {most}"
            found = f"has {len(value)} items" if value else "is empty"
            yield _Fault(path, sentence=f" {found}; send {span}.")


def _wrong_part(schema: Schema, value: Any, path: Path) -> Iterator[_Fault]:
    parts: list[tuple[Schema, Any, Path]] = []
    if isinstance(value, list) and "items" in schema:
        parts = [(schema["items"], item, (*path, index)) for index, item in enumerate(value)]
    elif isinstance(value, dict):
        properties, required = schema.get("properties", {}), schema.get("required", ())
        for name, inner in properties.items():
            if name in value:
                parts.append((inner, value[name], (*path, name)))
            elif name in required:
                yield from _first(parts)
                yield _Fault((*path, name), sentence=" is missing.")
        if "propertyNames" in schema:
            wrong = [name for name in value if not re.search(schema["propertyNames"]["pattern"], name)]
            if wrong:
                yield _Fault(path, sentence=f" has the name {wrong[0]!r}; {schema['description']}.")
        others: Schema = schema.get("additionalProperties", ANY)
        parts += [(others, value[name], (*path, name)) for name in value if others and name not in properties]
    yield from _first(parts)


def _first(parts: Sequence[tuple[Schema, Any, Path]]) -> Iterator[_Fault]:
    """The first fault of several values."""
    yield from (fault for part in parts if (fault := _fault(*part)) is not None)


_CHECKS = (_wrong_value, _wrong_kind, _wrong_size, _wrong_part)


def _bounded(kind: str, low: float | None, high: float | None) -> Schema:
    bounds = {"minimum": low, "maximum": high}
    return {"type": kind, **{name: bound for name, bound in bounds.items() if bound is not None}}


def _or_null(schema: Schema) -> Schema:
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    if "enum" in schema:
        return {**schema, "enum": [*(value for value in schema["enum"] if value is not None), None]}
    return {**schema, "type": [schema["type"], "null"]} if "type" in schema else schema


def _same(value: Any, known: Any) -> bool:
    """Equality of JSON values; Python's False is 0."""
    return isinstance(value, bool) == isinstance(known, bool) and bool(value == known)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _written(path: Path, dotted: bool) -> str:
    parts = (f"[{part}]" if isinstance(part, int) and not dotted else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")
