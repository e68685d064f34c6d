"""Spans as the rows of their table, made fast: for runs of very many requests. Observation path.

The same values as `lab.observe.spans` gives, from the same declarations. What is saved is the dictionary of
attributes: their JSON is filled into a template, of which there is one for each kind of span and types of values.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from json.encoder import encode_basestring
from typing import Any, NamedTuple, TypeAlias

from lab.observe.boundaries import EPOCH_NS, Boundary, Value


class PackedRow(NamedTuple):
    """One span, in the order of the table's columns."""

    trace_id: str
    span_id: str
    parent_span_id: str | None
    name: str
    kind: str
    start_time_unix_nano: int
    end_time_unix_nano: int
    plane: str
    path: str
    attributes: str


def packed(
    boundary: Boundary,
    trace: str,
    ordinal: int,
    parent: str | None,
    start: int,
    end: int,
    *values: Value | None,
    links: object = (),
) -> PackedRow:
    """A row from a span's declaration; `values` answer `boundary.attributes` in order, `None` leaves one out."""
    name = boundary.name
    types = tuple(map(type, values))
    template = _TEMPLATES.get((name, types))
    if template is None:
        template = _TEMPLATES[name, types] = _template(boundary, types)
    return PackedRow(
        trace,
        hashlib.blake2b(f"{trace}\x1f{name}\x1f{ordinal}".encode(), digest_size=8).hexdigest(),
        parent,
        name,
        boundary.kind,
        EPOCH_NS + start,
        EPOCH_NS + end,
        boundary.plane,
        boundary.path,
        template(values),
    )


_Template: TypeAlias = Callable[[Sequence[Value | None]], str]
_TEMPLATES: dict[tuple[str, tuple[type, ...]], _Template] = {}
"""How attributes become JSON, by the span's name and the types of its values."""

_FORMATS: dict[type, str] = {int: "%d", float: "%r"}
_WRITERS: dict[type, Callable[..., str]] = {
    str: encode_basestring,
    bool: lambda value: "true" if value else "false",
    tuple: functools.partial(json.dumps, separators=(",", ":"), ensure_ascii=False),
}


def _template(boundary: Boundary, types: tuple[type, ...]) -> _Template:
    names = [name for name, _ in boundary.attributes]
    if len(names) != len(types):
        raise ValueError(f"span '{boundary.name}' has {len(names)} attributes, and got {len(types)}")
    said = sorted((name, place) for place, name in enumerate(names) if types[place] is not type(None))
    parts = [f"{json.dumps(name)}:".replace("%", "%%") + _FORMATS.get(types[at], "%s") for name, at in said]
    text, places = "{" + ",".join(parts) + "}", [place for _, place in said]
    written = [(n, _WRITERS[types[at]]) for n, at in enumerate(places) if types[at] not in _FORMATS]

    def fill(values: Sequence[Value | None]) -> str:
        told: list[Any] = [values[place] for place in places]
        for n, write in written:
            told[n] = write(told[n])
        return text % tuple(told)

    return fill
