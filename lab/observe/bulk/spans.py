"""Spans by column: those of thousands of records at once, for the table of spans. Observation path.

What `lab.observe.spans` makes one by one is made here as whole columns: a record's spans are a template whose times,
ids and attributes are functions of the record's columns. A `Piece` is one place of the template, for all records that
have it; `laid_out` puts the pieces of a batch in the order in which single rows would have come. A test holds every
value equal to the rows'.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from json.encoder import encode_basestring
from typing import Any, NamedTuple

import numpy as np

from lab.observe.boundaries import BOUNDARIES, DECLARED, EPOCH_NS, Boundary
from lab.observe.bulk import functions

CODES: dict[str, int] = {name: code for code, name in enumerate(BOUNDARIES)}
"""Span names by number, as they stand in columns."""

_DIGITS = np.frombuffer("".join([f"{byte:02x}" for byte in range(256)]).encode(), dtype=np.uint16)
_ONCE = {
    kind: list(dict.fromkeys(getattr(each, kind) for each in DECLARED)) for kind in ("kind", "plane", "path")
}
_OF = {
    kind: np.array([words.index(getattr(each, kind)) for each in DECLARED], dtype=np.int32)
    for kind, words in _ONCE.items()
}


class Piece(NamedTuple):
    """Spans at one place of the template. All are columns, one value a span, in the order of the records."""

    names: Any
    """`CODES` of the spans: one for all, or a column."""
    rows: Any
    """Which record of the batch each belongs to, ascending; None: one of each."""
    ids: Any
    parents: Any
    """Numbers of the parents' ids; None for roots."""
    starts: Any
    ends: Any
    attributes: Any
    """JSON, as an Arrow array of strings."""


def laid_out(count: int, pieces: Sequence[Piece], traces: Any, trace_of: Any) -> list[Any]:
    """The columns of the table of spans: each record's pieces one after another, record after record.

    `traces` are trace ids (an Arrow array); `trace_of` says which is that of each of the `count` records.
    """
    import pyarrow as pa

    everyone = np.arange(count)
    own = [everyone if piece.rows is None else piece.rows for piece in pieces]
    counts = [None if piece.rows is None else np.bincount(piece.rows, minlength=count) for piece in pieces]
    each: Any = sum(1 if number is None else number for number in counts)
    each = np.broadcast_to(each, count)
    free = np.cumsum(each) - each
    total = int(each.sum())
    names, rows = np.empty(total, np.int32), np.empty(total, np.int64)
    ids, parents = np.empty(total, np.uint64), np.empty(total, np.uint64)
    starts, ends, rooted = np.empty(total, np.int64), np.empty(total, np.int64), np.ones(total, bool)
    order = np.empty(total, np.int64)
    done = 0
    for piece, row, number in zip(pieces, own, counts, strict=True):
        if number is None:
            at = free.copy()
            free += 1
        else:
            before = np.cumsum(number) - number
            at = free[row] + np.arange(len(row)) - before[row]
            free = free + number
        names[at], rows[at], ids[at] = piece.names, row, piece.ids
        starts[at], ends[at] = piece.starts, piece.ends
        if piece.parents is None:
            parents[at], rooted[at] = 0, False
        else:
            parents[at] = piece.parents
        order[at] = np.arange(done, done + len(row))
        done += len(row)
    starts += EPOCH_NS
    ends += EPOCH_NS
    attributes = functions.taken(pa.concat_arrays([piece.attributes for piece in pieces]), order)
    words = {kind: _words(of[names], _known(kind)) for kind, of in _OF.items()}
    return [
        _words(trace_of[rows], traces), _numbered(ids), _numbered(parents, rooted), _words(names, _known("name")),
        words["kind"], pa.array(starts), pa.array(ends), words["plane"], words["path"], attributes,
    ]  # fmt: skip


@cache
def _known(kind: str) -> Any:
    """The words that a column may hold."""
    import pyarrow as pa

    return pa.array(list(BOUNDARIES) if kind == "name" else _ONCE[kind], pa.string())


def _words(codes: Any, words: Any) -> Any:
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(pa.array(codes), words)


def _numbered(numbers: Any, there: Any = None) -> Any:
    """64-bit numbers as 16 hex digits each; null where not `there`."""
    return hexed(numbers.astype(">u8"), len(numbers), there)


def hexed(numbers: Any, count: int, there: Any = None) -> Any:
    """The bytes of `count` numbers of one size as hex digits; null where not `there`."""
    import pyarrow as pa

    text = _DIGITS.take(np.frombuffer(numbers, np.uint8))
    places = np.arange(count + 1, dtype=np.int32) * (2 * len(text) // max(1, count))
    known = None if there is None else pa.py_buffer(np.packbits(there, bitorder="little"))
    return pa.StringArray.from_buffers(count, pa.py_buffer(places), pa.py_buffer(text), known)


# -- attributes as JSON --------------------------------------------------------------------------------


class Plain(NamedTuple):
    """A column of words in which nothing has to be escaped."""

    words: Any


def told(texts: Sequence[str | None]) -> Any:
    """JSON by span as `attributes` takes it: what all have, or a column in which None is left out."""
    import pyarrow as pa

    if len(set(texts)) == 1:
        return texts[0]
    return pa.array(texts, pa.string())


def quoted(words: Sequence[str], optional: bool = False) -> Any:
    """Words as JSON; `optional` leaves empty ones out."""
    if len(set(words)) == 1:
        words = words[:1]
    return told([encode_basestring(word) if word or not optional else None for word in words])


def attributes(boundary: Boundary, count: int, *values: Any) -> Any:
    """The attributes of `count` spans, keys sorted. `values` answer `boundary.attributes` in order: a column of
    whole numbers, `Plain` words, JSON by span (Arrow, whose nulls leave it out), JSON that all have, or None."""
    import pyarrow as pa

    names = [name for name, _ in boundary.attributes]
    if len(names) != len(values):
        raise ValueError(f"span '{boundary.name}' has {len(names)} attributes, and got {len(values)}")
    groups: list[list[Any]] = [[]]
    """Texts and columns to be joined; a value that some spans don't have is a group of its own."""
    for name, value in sorted(zip(names, values, strict=True), key=lambda pair: pair[0]):
        if value is None:
            continue
        key, text = f"{json.dumps(name)}:", _text(value)
        if isinstance(text, pa.Array) and text.null_count:
            groups += [[key, text], []]
        elif isinstance(value, Plain):
            groups[-1] += [f',{key}"' if groups[-1] else f'{key}"', value.words, '"']
        else:
            groups[-1] += [f",{key}" if groups[-1] else key, text]
    groups = [group for group in groups if group]
    if len(groups) < 2:
        return _joined(count, ["{", *(groups[0] if groups else ()), "}"])
    parts = [_joined(count, group) for group in groups]
    return _joined(count, ["{", functions.joined(*parts, between=",", skip=True), "}"])


def _text(value: Any) -> Any:
    import pyarrow as pa

    if isinstance(value, np.ndarray) and len(value) and value.min() == value.max():
        return str(int(value[0]))
    return functions.written(value) if isinstance(value, np.ndarray | pa.Array) else value


def _joined(count: int, parts: Sequence[Any]) -> Any:
    """Texts and columns, one after another, as a column."""
    import pyarrow as pa

    merged: list[Any] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    if all(isinstance(part, str) for part in merged):
        return pa.repeat(pa.scalar("".join(merged), pa.string()), count)
    return functions.joined(*merged)
