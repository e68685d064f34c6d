"""Spans before any format: what every exporter that has to be fast starts from. Observation path.

The same spans as `lab.observe.spans` gives, from the same declarations, without a dictionary each: attribute values
stand in the order of the declaration. They come from a run's records, or from its table of spans where a run kept
no records (`run.record=requests`, `steps`); that table holds no links.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lab.errors import RunError
from lab.observe.boundaries import BOUNDARIES, EPOCH_NS, Boundary, Value
from lab.observe.identity import RunInfo, span_id
from lab.observe.recorder import Recorded
from lab.observe.spans import SpanLink, made

_COLUMNS = [
    "trace_id",
    "span_id",
    "parent_span_id",
    "name",
    "start_time_unix_nano",
    "end_time_unix_nano",
    "attributes",
]


class PlainSpan(NamedTuple):
    """One span. Times are run nanoseconds; `values` answer `boundary.attributes`, `None` leaves one out."""

    boundary: Boundary
    trace_id: str
    span_id: str
    parent_span_id: str | None
    start: int
    end: int
    values: tuple[Value | None, ...]
    links: tuple[SpanLink, ...] = ()

    @property
    def error(self) -> str:
        """What `error.type` says: why the request didn't finish; else ""."""
        place = ERRORS.get(self.boundary.name, -1)
        return str(self.values[place] or "") if place >= 0 else ""


ERRORS: dict[str, int] = {
    name: place
    for name, boundary in BOUNDARIES.items()
    for place, (key, _) in enumerate(boundary.attributes)
    if key == "error.type"
}
"""Where the attribute is among a span's values, for the spans that have it."""


def plain_spans(recorded: Recorded, info: RunInfo, *, links: bool = True) -> Iterator[PlainSpan]:
    """All spans of a run, in the order of `lab.observe.spans.spans`."""
    return made(recorded, info, _plain, links=links)


def _plain(
    boundary: Boundary,
    trace: str,
    ordinal: int,
    parent: str | None,
    start: int,
    end: int,
    *values: Value | None,
    links: tuple[SpanLink, ...] = (),
) -> PlainSpan:
    return PlainSpan(
        boundary, trace, span_id(trace, boundary.name, ordinal), parent, start, end, values, links
    )


def plain_spans_of_table(path: Path) -> Iterator[PlainSpan]:
    """The rows of `spans.parquet`, without links. Raises `RunError` when the file isn't that table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(8192, columns=_COLUMNS):
            columns = [batch.column(name).to_pylist() for name in _COLUMNS]
            for trace, own, parent, name, start, end, text in zip(*columns, strict=True):
                boundary = BOUNDARIES[name]
                said = json.loads(text)
                values = tuple(_value(said.get(key)) for key, _ in boundary.attributes)
                yield PlainSpan(boundary, trace, own, parent, start - EPOCH_NS, end - EPOCH_NS, values)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"can't read '{path}' as a table of spans: {reason}") from error


def _value(value: object) -> Value | None:
    return tuple(value) if isinstance(value, list) else value  # type: ignore[return-value]
