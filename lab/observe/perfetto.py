"""A run, or several over each other, as a Perfetto timeline (`timeline.perfetto-trace`). Observation path.

Protobuf in Perfetto's own format, which ui.perfetto.dev opens. Time 0 is where each run began, so a real and a
simulated run of one workload lie over each other:

    process for each run      real, sim
    ├── requests              a track for each request: waiting, prefill, decode; below it where its KV moved
    ├── replica N             the steps, one after the other, with what lies in them
    │   ├── rank N            each rank's part, where several compute
    │   └── counters          KV blocks held, cached, free; requests running, waiting; the batch
    └── gateway               replicas that come and go

An arrow (flow) leads from where a request begins to prefill or decode to the step that did so. Names are written once
and referred to by number; so are values that come again. Slices of no duration are instants.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lab.observe.boundaries import BOUNDARIES, Boundary, Value
from lab.observe.plain import PlainSpan
from lab.observe.protobuf import field, integer, number, text, varint

CHUNK = 1 << 20
"""Bytes written at a time."""

_BEGIN, _END, _INSTANT, _COUNTER = (bytes((0x48, kind)) for kind in (1, 2, 3, 4))  # TrackEvent.type
_SEQUENCE = number(10, 1)
_FRESH, _GOES_ON = (_SEQUENCE + number(13, flag) for flag in (1, 2))
_CHRONOLOGICAL, _EXPLICIT = 2, 3  # TrackDescriptor.child_ordering
_flow = struct.Struct("<BBQ").pack  # field 47, fixed64: tag 0xf9 0x02
_double = struct.Struct("<d").pack

_NAMES = {name: place for place, name in enumerate(BOUNDARIES, 1)}
_PLANES = {"control": 1, "data": 2}
_KEYS = {
    key: place
    for place, key in enumerate(
        dict.fromkeys(key for boundary in BOUNDARIES.values() for key, _ in boundary.attributes), 1
    )
}
_ONCE = frozenset({"lab.request.id", "lab.plan.digest", "gen_ai.conversation.id"})
"""Texts that seldom come again: written where they stand."""

_COUNTERS = (
    ("KV blocks held", "blocks", "kv"),
    ("KV blocks cached", "blocks", "kv"),
    ("KV blocks free", "blocks", "kv"),
    ("requests running", "requests", ""),
    ("requests waiting", "requests", ""),
    ("batch requests", "requests", ""),
    ("batch prefill tokens", "tokens", "batch"),
    ("batch decode tokens", "tokens", "batch"),
)
"""Name, unit, and what shares an axis."""


def _places(name: str, *keys: str) -> tuple[int, ...]:
    known = [key for key, _ in BOUNDARIES[name].attributes]
    return tuple(map(known.index, keys))


_AFTER_PLAN = _places(
    "step.plan",
    *(f"lab.kv.blocks_{kind}" for kind in ("held", "cached", "free")),
    *(f"lab.requests.{kind}" for kind in ("running", "waiting")),
)
_BATCH = _places("step.execute", "lab.batch.requests", "lab.batch.prefill_tokens", "lab.batch.decode_tokens")
_REQUEST = _places("request", "lab.request.id", "lab.replica")
_STEP = _places("step", "lab.step.index", "lab.replica")
_RANK = _places("step.rank", "lab.rank")[0]
_MOVED_TO = _places("kv.transfer", "lab.transfer.destination")[0]


def write_timeline(path: Path, runs: Sequence[tuple[str, Iterable[PlainSpan]]]) -> int:
    """Write a timeline of runs, each with the name of its process; returns how many spans. OS errors pass through."""
    written = 0
    with path.open("wb") as file:
        out = _Out(file.write)
        for name, spans in runs:
            side = _Side(out, name)
            for span in spans:
                side.add(span)
                written += 1
            side.close()
        out.flush()
    return written


class _Flow(NamedTuple):
    """An arrow from a stretch of a request's life, which began and ended then."""

    number: int
    start: int
    end: int


class _Out:
    """Packets on their way into a file, numbers of tracks and flows, and the texts that have a number."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._waiting: list[bytes] = []
        self._size = 0
        self._last = 0
        self._texts: dict[str, int] = {}
        self._new: list[bytes] = []
        self.processes = 0
        entries = ((2, _NAMES), (1, _PLANES), (3, _KEYS))  # event names, categories, names of annotations
        known = [
            field(tag, number(1, n) + text(2, name)) for tag, table in entries for name, n in table.items()
        ]
        self.packet(_FRESH + field(12, b"".join(known)))

    def number(self) -> int:
        """One that nothing else has."""
        self._last += 1
        return self._last

    def packet(self, content: bytes) -> None:
        packet = b"\x0a" + varint(len(content)) + content
        self._waiting.append(packet)
        self._size += len(packet)
        if self._size >= CHUNK:
            self.flush()

    def flush(self) -> None:
        self._write(b"".join(self._waiting))
        self._waiting.clear()
        self._size = 0

    def event(self, at: int, content: bytes) -> None:
        """A `TrackEvent`, with the texts that are new in it."""
        new = b""
        if self._new:
            new = field(12, b"".join(self._new))
            self._new.clear()
        self.packet(b"\x40" + varint(at) + _GOES_ON + new + b"\x5a" + varint(len(content)) + content)

    def track(self, name: str, parent: int, rank: int = 0, more: bytes = b"") -> int:
        """A new track; `rank` is its place where the parent's order is explicit."""
        own = self.number()
        about = number(1, own) + text(2, name) + number(5, parent) + number(12, rank) + more
        self.packet(_SEQUENCE + field(60, about))
        return own

    def process(self, name: str) -> int:
        own = self.number()
        self.processes += 1
        about = number(1, own) + field(3, number(1, self.processes) + text(6, name))
        self.packet(_SEQUENCE + field(60, about))
        return own

    def text_number(self, value: str) -> int:
        found = self._texts.get(value)
        if found is None:
            found = self._texts[value] = len(self._texts) + 1
            self._new.append(field(29, number(1, found) + text(2, value)))
        return found


class _Replica:
    """The tracks of one replica, and what its counters say."""

    def __init__(self, out: _Out, parent: int, index: int) -> None:
        self._out, self._index = out, index
        self.group = out.track(f"replica {index}", parent, index, number(11, _EXPLICIT))
        self.steps = out.track("steps", self.group, 0)
        self._ranks: dict[int, int] = {}
        self._counters: list[int] = []
        self._said = [0] * len(_COUNTERS)
        self.ended = 0

    def rank(self, rank: int) -> int:
        if rank not in self._ranks:
            self._ranks[rank] = self._out.track(f"rank {rank}", self.group, 1 + rank)
        return self._ranks[rank]

    def count(self, at: int, first: int, values: Iterable[Any]) -> None:
        """The counters from `first` on have these values from `at` on."""
        if not self._counters:
            for place, (name, unit, shared) in enumerate(_COUNTERS):
                about = text(6, unit) + (text(7, shared) if shared else b"")
                self._counters.append(self._out.track(name, self.group, 1000 + place, field(8, about)))
        for place, value in enumerate(values, first):
            if value != self._said[place]:
                self._said[place] = value
                track = varint(self._counters[place])
                self._out.event(at, _COUNTER + b"\x58" + track + b"\xf0\x01" + integer(value))

    def idle(self, until: int) -> None:
        """Between the end of the last step and the next one's start nothing is computed."""
        if until > self.ended and self._counters:
            self.count(self.ended, 5, (0, 0, 0))


class _Side:
    """One run: turns spans, parents before children, into begins and ends on tracks."""

    def __init__(self, out: _Out, name: str) -> None:
        self._out = out
        self._process = out.process(name)
        self._requests = 0
        self._gateway = 0
        self._replicas: dict[int, _Replica] = {}
        self._flows: dict[tuple[int, int], list[_Flow]] = {}
        """Replica and step -> arrows that end there."""
        self._begun: list[tuple[int, _Flow]] = []
        """Of the request at hand: the steps that its arrows lead to."""
        self._moves = 0
        """Track of its moves to another replica."""
        self._track = 0
        self._replica = -1
        self._ranks: dict[str, int] = {}
        """Spans of ranks in the step at hand -> their track."""
        self._open: dict[int, list[tuple[str, int]]] = {}
        """Track -> spans that were begun there and not ended: id and end."""

    def add(self, span: PlainSpan) -> None:
        """One more span. A root ends what was open before it."""
        boundary, name = span.boundary, span.boundary.name
        flows: Sequence[int] = ()
        if span.parent_span_id is None:
            self._end_all()
            flows = self._root(span)
        track = self._track
        if name == "step.rank":
            track = self._ranks[span.span_id] = self._replicas[self._replica].rank(int(span.values[_RANK]))  # type: ignore[arg-type]
        elif self._ranks and span.parent_span_id in self._ranks:
            track = self._ranks[span.parent_span_id]
        elif name in ("request.prefill", "request.decode"):
            flows = (self._out.number(),)
            arrow = (int(span.values[0]), _Flow(flows[0], span.start, span.end))  # type: ignore[arg-type]
            self._begun.append(arrow)
            self._flows.setdefault((self._replica, arrow[0]), []).append(arrow[1])
        elif name == "kv.transfer" and span.values[_MOVED_TO] is not None:
            track = self._moved(span)
        open_here = self._open.setdefault(track, [])
        if any(own == span.parent_span_id for own, _ in open_here):
            while open_here[-1][0] != span.parent_span_id:
                self._end(track, open_here.pop()[1])
        head, annotate = _event(boundary, tuple(map(type, span.values)))
        kind = _INSTANT if span.start == span.end else _BEGIN
        arrows = b"".join(_flow(0xF9, 0x02, flow) for flow in flows)
        where = b"\x58" + varint(track)
        self._out.event(span.start, kind + where + head + annotate(span.values, self._out) + arrows)
        if kind is _BEGIN:
            open_here.append((span.span_id, span.end))
        if name == "step.plan":
            self._replicas[self._replica].count(span.end, 0, [span.values[place] for place in _AFTER_PLAN])
        elif name == "step.execute":
            self._replicas[self._replica].count(span.start, 5, [span.values[place] for place in _BATCH])

    def close(self) -> None:
        """End what is open."""
        self._end_all()
        for replica in self._replicas.values():
            replica.idle(replica.ended + 1)

    def _root(self, span: PlainSpan) -> Sequence[int]:
        """Choose the track of a trace; returns the arrows that end at its root."""
        out, values = self._out, span.values
        if span.boundary.name == "step":
            index, number_of = (int(values[place]) for place in _STEP)  # type: ignore[arg-type]
            replica = self._at(number_of)
            replica.idle(span.start)
            replica.ended = span.end
            self._track, self._replica = replica.steps, number_of
            self._ranks.clear()
            # A step of that number on a replica that the request had left (one that failed) is another one.
            ending = self._flows.pop((number_of, index), ())
            return [flow.number for flow in ending if flow.start <= span.start < flow.end]
        if span.boundary.name == "request":
            if not self._requests:
                self._requests = out.track("requests", self._process, 0, number(11, _CHRONOLOGICAL))
            self._track = out.track(str(values[_REQUEST[0]]), self._requests)
            self._replica = int(values[_REQUEST[1]])  # type: ignore[arg-type]
            self._begun, self._moves = [], 0
        else:
            self._gateway = self._gateway or out.track("gateway", self._process)
            self._track = self._gateway
        return ()

    def _moved(self, span: PlainSpan) -> int:
        """A track for moves, which waiting overlaps; arrows of what came after one lead to the new replica."""
        before, there = self._replica, int(span.values[_MOVED_TO])  # type: ignore[arg-type]
        self._replica = there
        for step, flow in self._begun:
            if flow.start >= span.start:
                self._flows[before, step].remove(flow)
                self._flows.setdefault((there, step), []).append(flow)
        self._moves = self._moves or self._out.track("moves", self._track)
        return self._moves

    def _at(self, index: int) -> _Replica:
        if index not in self._replicas:
            self._replicas[index] = _Replica(self._out, self._process, index)
        return self._replicas[index]

    def _end(self, track: int, at: int) -> None:
        self._out.event(at, _END + b"\x58" + varint(track))

    def _end_all(self) -> None:
        for track, spans in self._open.items():
            while spans:
                self._end(track, spans.pop()[1])
        self._open.clear()


_Annotate = Callable[[Sequence[Value | None], _Out], bytes]


@functools.cache
def _event(boundary: Boundary, types: tuple[type, ...]) -> tuple[bytes, _Annotate]:
    """Category and name, encoded, and what encodes the attributes of a span whose values have these types."""
    head = number(3, _PLANES[boundary.plane]) + number(10, _NAMES[boundary.name])
    writers = [
        (_writer(key, types[place]), place)
        for place, (key, _) in enumerate(boundary.attributes)
        if types[place] is not type(None)
    ]
    return head, lambda values, out: b"".join([write(values[place], out) for write, place in writers])


@functools.cache
def _writer(key: str, kind: type) -> Callable[[Any, _Out], bytes]:
    """What encodes a value of a type as the `DebugAnnotation` of a key."""
    named = number(1, _KEYS[key])
    if kind is bool:
        return lambda value, out: field(4, named + number(2, value))
    if kind is int:
        counted = functools.lru_cache(4096)(lambda value: field(4, named + number(4, value)))
        return lambda value, out: counted(value)
    if kind is float:
        return lambda value, out: field(4, named + b"\x29" + _double(value))
    if kind is tuple:
        return lambda value, out: (
            field(4, named + b"".join(field(12, text(6, item)) for item in value)) if value else b""
        )
    if key in _ONCE:
        return lambda value, out: field(4, named + text(6, value))
    return lambda value, out: field(4, named + number(17, out.text_number(value)))
