"""Azure LLM inference traces, 2023 and 2024 (CC-BY 4.0). Request path.

Columns TIMESTAMP, ContextTokens, GeneratedTokens. 2023 writes `2023-11-16 18:17:03.9799600` (7 digits, no
zone), 2024 `2024-05-10 00:00:00.009930+00:00`. There is no content, so every prompt is text of its own.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import islice

from lab.control.request import Segment, stream_of
from traces.files import BROKEN, Place, csv_rows, describe, plain_lines, shown, tokens
from traces.shape import FileOptions, Row, assemble
from traces.workload import Workload

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_TIME = r"(20\d\d-\d\d-\d\d[ T](?:[01]\d|2[0-3]):\d\d):([0-5]\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:?\d\d)?"
_TIMESTAMP = re.compile(_TIME, re.ASCII)
_PLAIN_ROW = re.compile(_TIME + r",([1-9]\d{0,8}),([1-9]\d{0,8})\r?\n?", re.ASCII)
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass
class AzureOptions(FileOptions):
    """Azure 2023 or 2024; the file says which."""


def load_azure(name: str, options: AzureOptions, path: str) -> Workload:
    """The file at `path` as a workload called `name`."""
    return assemble(name, _rows(name, path), options.shape(), {"trace": name, **describe(path)})


def _rows(name: str, path: str) -> Iterator[Row]:
    rest = yield from _plain_rows(name, path)
    if rest is not None:
        yield from _csv_rows(name, path, rest)


def _csv_rows(name: str, path: str, first: int) -> Iterator[Row]:
    """From row `first` on, as any CSV may be written."""
    for index, (place, row) in enumerate(islice(csv_rows(path, _COLUMNS), first, None), first):
        prompt = Segment(stream_of(name, index), 0, tokens(place, row, "ContextTokens"))
        arrival = timestamp_ns(place, row["TIMESTAMP"])
        yield Row(arrival, (prompt,), tokens(place, row, "GeneratedTokens"))


def _plain_rows(name: str, path: str) -> Generator[Row, None, int | None]:
    """Rows as long as they are written as Azure does, in a quarter of the time that CSV takes; returns how many those
    were, or None where there are no others."""
    rows = 0
    try:
        lines = plain_lines(path)
        if next(lines, "").rstrip("\r\n") != ",".join(_COLUMNS):
            return 0
        for line in lines:
            match = _PLAIN_ROW.fullmatch(line)
            if match is None:
                return rows
            *time, prompt, output = match.groups()
            yield Row(_since_2000(*time), (Segment(stream_of(name, rows), 0, int(prompt)),), int(output))
            rows += 1
    except BROKEN:
        return rows
    return None


def timestamp_ns(place: Place, text: str) -> int:
    """Nanoseconds since the year 2000, exactly; a timestamp without a zone is UTC. `place` is the row's."""
    match = _TIMESTAMP.fullmatch(text.strip(" \t"))
    try:
        if match is None:
            raise ValueError
        return _since_2000(*match.groups())
    except (ValueError, OverflowError):
        raise place.at("TIMESTAMP").error(
            f"{shown(text)}; expected a time such as 2023-11-16 18:17:03.9799600"
        ) from None


def _since_2000(minute: str, second: str, fraction: str | None, zone: str | None) -> int:
    """Nanoseconds. Raises `ValueError`, `OverflowError`."""
    return (_minute_s(minute, zone) + int(second)) * 1_000_000_000 + int((fraction or "0").ljust(9, "0"))


@lru_cache(maxsize=64)  # rows come in order
def _minute_s(minute: str, zone: str | None) -> int:
    """When a minute begins, seconds since the year 2000. Raises `ValueError`, `OverflowError`."""
    moment = datetime.fromisoformat(f"{minute}:00+00:00")
    if zone and zone != "Z":
        hours, minutes = int(zone[1:3]), int(zone[-2:])
        if hours > 23 or minutes > 59:
            raise ValueError
        shift = timedelta(hours=hours, minutes=minutes)
        moment += -shift if zone[0] == "+" else shift
    since = moment - _EPOCH
    return since.days * 86_400 + since.seconds
