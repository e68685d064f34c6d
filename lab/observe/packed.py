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
from typing import NamedTuple

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
        _template(boundary, tuple(map(type, values)))(values),
    )


_WRITERS: dict[type, Callable[..., str]] = {
    str: encode_basestring,
    int: int.__repr__,
    float: float.__repr__,
    bool: lambda value: "true" if value else "false",
    tuple: functools.partial(json.dumps, separators=(",", ":"), ensure_ascii=False),
}


@functools.cache
def _template(boundary: Boundary, types: tuple[type, ...]) -> Callable[[Sequence[Value | None]], str]:
    names = [name for name, _ in boundary.attributes]
    if len(names) != len(types):
        raise ValueError(f"span '{boundary.name}' has {len(names)} attributes, and got {len(types)}")
    said = sorted((name, place) for place, name in enumerate(names) if types[place] is not type(None))
    text = "{" + ",".join(json.dumps(name).replace("%", "%%") + ":%s" for name, _ in said) + "}"
    writers = [(_WRITERS[types[place]], place) for _, place in said]

    def fill(values: Sequence[Value | None]) -> str:
        return text % tuple([write(values[place]) for write, place in writers])

    return fill
