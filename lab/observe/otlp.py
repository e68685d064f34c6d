"""Spans as OTLP, packed by hand: protobuf for endpoints, JSON lines for files. Observation path.

OpenTelemetry's SDK encodes a span in tens of microseconds, most of which go into objects. Here the unchanging part of
each kind of span (name, keys of attributes) is encoded once, and only ids, times and values are put in. A test parses
everything back with the official classes and holds it equal to what the official encoder says.

The file is the "OpenTelemetry Protocol File Exporter" format: JSON lines, one TracesData each; ids in hex,
enums as numbers, 64-bit integers as strings (protobuf's own JSON mapping does the first two otherwise).
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

from lab.observe.boundaries import EPOCH_NS, SCHEMA_VERSION, Boundary, Value
from lab.observe.identity import RunInfo
from lab.observe.plain import ERRORS, PlainSpan
from lab.observe.protobuf import field, integer, text, varint
from lab.observe.spans import SpanLink

SCOPE = "lab.observe"
MOST_BYTES = 2 << 20
"""Of one message to an endpoint: half of what gRPC servers take when not told otherwise."""
MOST_SPANS = 8192
LINE_SPANS = 512
"""Spans in one line of a file."""

_KINDS = {"INTERNAL": 1, "SERVER": 2}
_REMOTE_KNOWN = 0x100
"""SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK: the parent is known, and isn't remote."""
_FLAGS = struct.pack("<BBI", 0x85, 0x01, _REMOTE_KNOWN)  # field 16, fixed32
_LINK_FLAGS = struct.pack("<BI", 0x35, _REMOTE_KNOWN)  # field 6, fixed32
_ERROR = 2

_times = struct.Struct("<BQBQ").pack
_double = struct.Struct("<d").pack
Values = Sequence[Value | None]


# -- protobuf --------------------------------------------------------------------------------------------


def messages(
    spans: Iterable[PlainSpan], info: RunInfo, most_bytes: int = MOST_BYTES, most_spans: int = MOST_SPANS
) -> Iterator[tuple[bytes, int]]:
    """Encoded `ExportTraceServiceRequest`s (which are `TracesData` too), each with how many spans it holds.

    None is longer than `most_bytes`, unless a single span is: a span can't be divided.
    """
    resource = field(1, b"".join(_attribute(key, value) for key, value in info.attributes().items()))
    scope = field(1, text(1, SCOPE) + text(2, str(SCHEMA_VERSION)))
    around = len(resource) + len(scope) + 24  # tags and lengths of the two messages around the spans
    waiting: list[bytes] = []
    size = around

    def message() -> bytes:
        return field(1, resource + field(2, scope + b"".join(waiting)))

    for span in spans:
        packed = pack(span)
        if waiting and (size + len(packed) > most_bytes or len(waiting) >= most_spans):
            yield message(), len(waiting)
            waiting, size = [], around
        waiting.append(packed)
        size += len(packed)
    if waiting:
        yield message(), len(waiting)


def pack(span: PlainSpan) -> bytes:
    """A span as field 2 of `ScopeSpans`: tag, length, message."""
    boundary, trace, own, parent, start, end, values, links = span
    fixed, fill = _packer(boundary, tuple(map(type, values)))
    parts = [_trace(trace), b"\x12\x08", bytes.fromhex(own)]
    if parent:
        parts += b"\x22\x08", bytes.fromhex(parent)
    parts += fixed, _times(0x39, EPOCH_NS + start, 0x41, EPOCH_NS + end), *fill(values)
    if links:
        parts += map(_link, links)
    if boundary.name in ERRORS and span.error:
        parts.append(field(15, text(2, span.error) + bytes((0x18, _ERROR))))
    else:
        parts.append(b"\x7a\x00")
    parts.append(_FLAGS)
    body = b"".join(parts)
    return b"\x12" + varint(len(body)) + body


@functools.lru_cache(4096)
def _trace(trace: str) -> bytes:
    return b"\x0a\x10" + bytes.fromhex(trace)


@functools.lru_cache(16384)
def _link(link: SpanLink) -> bytes:
    attributes = b"".join(_attribute(key, value, 4) for key, value in link.attributes.items())
    ids = field(1, bytes.fromhex(link.trace_id)) + field(2, bytes.fromhex(link.span_id))
    return field(13, ids + attributes + _LINK_FLAGS)


def _attribute(key: str, value: Value, number: int = 1) -> bytes:
    """A `KeyValue` in field `number`."""
    kind: Any = type(value)
    return _writer(key, kind, number)(value)


@functools.cache
def _packer(boundary: Boundary, types: tuple[type, ...]) -> tuple[bytes, Callable[[Values], list[bytes]]]:
    """Name and kind, encoded, and what encodes the attributes of a span whose values have these types."""
    names = [name for name, _ in boundary.attributes]
    if len(names) != len(types):
        raise ValueError(f"span '{boundary.name}' has {len(names)} attributes, and got {len(types)}")
    writers = [
        (_writer(name, types[place], 9), place)
        for place, name in enumerate(names)
        if types[place] is not type(None)
    ]
    fixed = text(5, boundary.name) + bytes((0x30, _KINDS[boundary.kind]))
    return fixed, lambda values: [write(values[place]) for write, place in writers]


@functools.cache
def _writer(key: str, kind: type, number: int) -> Callable[[Any], bytes]:
    """What encodes a value of a type as the `KeyValue` of a key. Values that come often are encoded once."""
    named = text(1, key)

    def pair(value: bytes) -> bytes:
        return field(number, named + field(2, value))

    if kind is bool:
        either = (pair(b"\x10\x00"), pair(b"\x10\x01"))
        return lambda value: either[value]
    if kind is float:
        head = pair(b"\x21" + bytes(8))[:-8]
        return lambda value: head + _double(value)
    if kind is int:
        return functools.lru_cache(4096)(lambda value: pair(b"\x18" + integer(value)))
    if kind is str:
        return functools.lru_cache(1024)(lambda value: pair(text(1, value)))
    if kind is tuple:
        return functools.lru_cache(256)(
            lambda value: pair(field(5, b"".join(field(1, text(1, item)) for item in value)))
        )
    raise TypeError(f"an attribute of type {kind.__name__}")


# -- JSON lines ------------------------------------------------------------------------------------------


def write_otlp(path: Path, spans: Iterable[PlainSpan], info: RunInfo) -> int:
    """Write spans as an OTLP file (`.jsonl`); returns how many. OS errors pass through."""
    resource = ",".join(_json_attribute(key, value) for key, value in info.attributes().items())
    scope = f'{{"name":"{SCOPE}","version":"{SCHEMA_VERSION}"}}'
    head = f'{{"resourceSpans":[{{"resource":{{"attributes":[{resource}]}},"scopeSpans":[{{"scope":{scope},"spans":['
    written = 0
    waiting: list[str] = []
    with path.open("w", encoding="utf-8") as file:
        for span in spans:
            waiting.append(_json(span))
            if len(waiting) == LINE_SPANS:
                file.write(f"{head}{','.join(waiting)}]}}]}}]}}\n")
                written += len(waiting)
                waiting.clear()
        if waiting:
            file.write(f"{head}{','.join(waiting)}]}}]}}]}}\n")
    return written + len(waiting)


def _json(span: PlainSpan) -> str:
    boundary, trace, own, parent, start, end, values, links = span
    middle, fill = _json_template(boundary, tuple(map(type, values)))
    above = f'"parentSpanId":"{parent}",' if parent else ""
    linked = f'"links":[{",".join(map(_json_link, links))}],' if links else ""
    error = span.error if boundary.name in ERRORS else ""
    status = f'{{"message":{encode_basestring(error)},"code":{_ERROR}}}' if error else "{}"
    return (
        f'{{"traceId":"{trace}","spanId":"{own}",{above}{middle}"startTimeUnixNano":"{EPOCH_NS + start}",'
        f'"endTimeUnixNano":"{EPOCH_NS + end}",{fill(values)}{linked}"status":{status}}}'
    )


@functools.lru_cache(16384)
def _json_link(link: SpanLink) -> str:
    attributes = ",".join(_json_attribute(key, value) for key, value in link.attributes.items())
    ids = f'"traceId":"{link.trace_id}","spanId":"{link.span_id}"'
    return f'{{{ids},"attributes":[{attributes}],"flags":{_REMOTE_KNOWN}}}'


def _strings(values: tuple[str, ...]) -> str:
    return '{"values":[' + ",".join(f'{{"stringValue":{encode_basestring(item)}}}' for item in values) + "]}"


_JSON: dict[type, tuple[str, Callable[[Any], str]]] = {
    bool: ('"boolValue":%s', lambda value: "true" if value else "false"),
    int: ('"intValue":"%s"', int.__repr__),
    float: ('"doubleValue":%s', float.__repr__),
    str: ('"stringValue":%s', encode_basestring),
    tuple: ('"arrayValue":%s', _strings),
}


def _json_attribute(key: str, value: Value) -> str:
    form, write = _JSON[type(value)]
    return f'{{"key":{json.dumps(key)},"value":{{{form % write(value)}}}}}'


@functools.cache
def _json_template(boundary: Boundary, types: tuple[type, ...]) -> tuple[str, Callable[[Values], str]]:
    """Flags, name and kind as text, and what writes the attributes of a span whose values have these types."""
    said = [
        (name, place) for place, (name, _) in enumerate(boundary.attributes) if types[place] is not type(None)
    ]
    pairs = [f'{{"key":{json.dumps(name)},"value":{{{_JSON[types[place]][0]}}}}}' for name, place in said]
    form = f'"attributes":[{",".join(pairs)}],' if pairs else ""
    writers = [(_JSON[types[place]][1], place) for _, place in said]
    middle = f'"flags":{_REMOTE_KNOWN},"name":{json.dumps(boundary.name)},"kind":{_KINDS[boundary.kind]},'
    return middle, lambda values: form % tuple([write(values[place]) for write, place in writers])
