"""From rows of a trace to a `Workload`: the options and the rules every loader shares. Request path."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from lab.control.request import Piece, Prompt, Request, Segment
from lab.errors import ConfigError, TraceError
from traces.workload import Workload, rescaled

MOST_ROWS = 1 << 60
"""Beyond any file, and small enough that `offset + limit` still counts as an index."""


def require(good: bool, option: str, value: object, expected: str) -> None:
    """Raise the one sentence an option that makes no sense deserves."""
    if not good:
        raise ConfigError(f"trace.{option} is {value}; expected {expected}")


@dataclass(frozen=True, slots=True)
class Shape:
    """How rows become requests. `None` means no limit, no clip, no SLO. Times in ns, lengths in tokens.

    `offset` and `limit` count rows in file order. `max_prompt` keeps the first tokens of a prompt, so a
    shared prefix stays shared.
    """

    limit: int | None = None
    offset: int = 0
    rate_scale: float = 1.0
    max_prompt: int | None = None
    max_output: int | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "max_prompt", "max_output"):
            value = getattr(self, name)
            good = value is None or 1 <= value <= MOST_ROWS
            require(good, name, value, "an integer >= 1, or null for no limit")
        require(0 <= self.offset <= MOST_ROWS, "offset", self.offset, "an integer >= 0")
        good = math.isfinite(self.rate_scale) and self.rate_scale > 0
        require(good, "rate_scale", self.rate_scale, "a number > 0")

    def clip_output(self, tokens: int) -> int:
        """Output tokens after the clip; what a later turn quotes is what was really generated."""
        return tokens if self.max_output is None else min(tokens, self.max_output)


@dataclass
class ShapeOptions:
    """What a user may set on any trace; `traces.registry.build` checks names and types."""

    limit: int | None = None
    """At most this many requests, counted in file order after `offset`."""
    offset: int = 0
    """Requests to skip at the beginning of the file."""
    rate_scale: float = 1.0
    """Arrivals are divided by this; the time between turns of one session never is."""
    max_prompt: int | None = None
    """Longer prompts keep their first tokens only."""
    max_output: int | None = None
    """Longer outputs are cut to this."""

    def shape(self) -> Shape:
        """The checked, frozen form, in ns."""
        return Shape(
            limit=self.limit,
            offset=self.offset,
            rate_scale=self.rate_scale,
            max_prompt=self.max_prompt,
            max_output=self.max_output,
        )


@dataclass
class FileOptions(ShapeOptions):
    """A trace that is read from a file."""

    path: str | None = None
    """The file, plain or gzip."""


class Row(NamedTuple):
    """One request as a file has it: arrival in ns on the file's own clock, lengths >= 1."""

    arrival_ns: int
    pieces: tuple[Piece, ...]
    output_len: int
    tenant: str = ""
    session: str = ""
    priority: int = 0
    ttft_slo_ns: int | None = None
    tpot_slo_ns: int | None = None


@dataclass(slots=True)
class _Tally:
    """What the shape changed; goes into the provenance so that no change is silent."""

    clipped_prompts: int = 0
    clipped_outputs: int = 0
    out_of_order: int = 0


def request_id(index: int) -> str:
    """The id of row `index` (0-based, in file order): the same whatever `offset` and `limit` are."""
    return f"r{index:06d}"


def assemble(name: str, rows: Iterable[Row], shape: Shape, source: Mapping[str, object]) -> Workload:
    """Slice, clip, sort by arrival (stable), start the clock at the first kept arrival, rescale.

    `rows` is read no further than `offset + limit`. Raises TraceError when nothing is left.
    """
    tally = _Tally()
    stop = None if shape.limit is None else shape.offset + shape.limit
    seen = 0
    before = None
    kept: list[tuple[int, Row]] = []
    for index, row in enumerate(islice(rows, stop)):
        seen = index + 1
        if index < shape.offset:
            continue
        tally.out_of_order += before is not None and row.arrival_ns < before
        before = row.arrival_ns
        kept.append((index, row))
    if not kept:
        where = source.get("path", name)
        if not seen:
            raise TraceError(f"trace file '{where}' has no requests; expected at least 1 row")
        raise TraceError(f"trace file '{where}' has {seen} requests; trace.offset={shape.offset} skips all")
    kept.sort(key=_arrival)
    start = kept[0][1].arrival_ns
    arrivals: Iterable[int] = (row.arrival_ns - start for _, row in kept)
    if shape.rate_scale != 1:
        told = ((request_id(index), row.session, row.arrival_ns - start) for index, row in kept)
        arrivals = rescaled(told, shape.rate_scale)
    requests = [
        _request(index, row, arrival, shape, tally)
        for (index, row), arrival in zip(kept, arrivals, strict=True)
    ]
    requests.sort(
        key=attrgetter("arrival")
    )  # later turns of a session keep their distance, and may fall behind
    provenance: dict[str, object] = {
        **source,
        "offset": shape.offset,
        "limit": shape.limit,
        "rate_scale": 1.0 * shape.rate_scale,
        "max_prompt": shape.max_prompt,
        "max_output": shape.max_output,
        "clipped_prompts": tally.clipped_prompts,
        "clipped_outputs": tally.clipped_outputs,
        "out_of_order": tally.out_of_order,
    }
    return Workload(name, tuple(requests), provenance)


def _arrival(entry: tuple[int, Row]) -> int:
    return entry[1].arrival_ns


def _request(index: int, row: Row, arrival: int, shape: Shape, tally: _Tally) -> Request:
    pieces = row.pieces
    if shape.max_prompt is not None and sum(map(len, pieces)) > shape.max_prompt:
        pieces = head(pieces, shape.max_prompt)
        tally.clipped_prompts += 1
    output_len = shape.clip_output(row.output_len)
    tally.clipped_outputs += output_len < row.output_len
    return Request(
        id=request_id(index),
        prompt=Prompt(pieces),
        arrival=arrival,
        max_tokens=output_len,
        output_len=output_len,
        tenant=row.tenant,
        session=row.session,
        priority=row.priority,
        ttft_slo=row.ttft_slo_ns,
        tpot_slo=row.tpot_slo_ns,
    )


def head(pieces: tuple[Piece, ...], tokens: int) -> tuple[Piece, ...]:
    """The first `tokens` tokens of `pieces`."""
    kept: list[Piece] = []
    for piece in pieces:
        if tokens <= 0:
            break
        if len(piece) > tokens:
            if isinstance(piece, Segment):
                piece = Segment(piece.stream, piece.start, tokens)
            else:
                piece = piece[:tokens]
        kept.append(piece)
        tokens -= len(piece)
    return tuple(kept)
