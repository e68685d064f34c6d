"""Azure LLM inference traces, 2023 and 2024 (CC-BY 4.0). Request path.

Columns TIMESTAMP, ContextTokens, GeneratedTokens. 2023 writes `2023-11-16 18:17:03.9799600` (7 digits, no
zone), 2024 `2024-05-10 00:00:00.009930+00:00`. There is no content, so every prompt is text of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from lab.control.request import Segment, stream_of
from traces.files import Place, csv_rows, describe, shown, tokens
from traces.shape import FileOptions, Row, assemble
from traces.workload import Workload

_TIMESTAMP = re.compile(
    r"(20\d\d)-(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:Z|([+-])(\d\d):?(\d\d))?", re.ASCII
)
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass
class AzureOptions(FileOptions):
    """Azure 2023 or 2024; the file says which."""


def load_azure(name: str, options: AzureOptions, path: str) -> Workload:
    """The file at `path` as a workload called `name`."""
    return assemble(name, _rows(name, path), options.shape(), {"trace": name, **describe(path)})


def _rows(name: str, path: str) -> Iterator[Row]:
    for index, (place, row) in enumerate(csv_rows(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))):
        prompt = Segment(stream_of(name, index), 0, tokens(place, row, "ContextTokens"))
        arrival = timestamp_ns(place, row["TIMESTAMP"])
        yield Row(arrival, (prompt,), tokens(place, row, "GeneratedTokens"))


def timestamp_ns(place: Place, text: str) -> int:
    """Nanoseconds since the year 2000, exactly; a timestamp without a zone is UTC. `place` is the row's."""
    match = _TIMESTAMP.fullmatch(text.strip(" \t"))
    try:
        if match is None:
            raise ValueError
        *minute, second, fraction, sign, hours, minutes = match.groups()
        if second > "59":
            raise ValueError
        began = _minute_s(*minute, sign, hours, minutes)
    except (ValueError, OverflowError):
        raise place.at("TIMESTAMP").error(
            f"{shown(text)}; expected a time such as 2023-11-16 18:17:03.9799600"
        ) from None
    return (began + int(second)) * 1_000_000_000 + int((fraction or "0").ljust(9, "0"))


@lru_cache(maxsize=64)  # rows come in order
def _minute_s(
    year: str, month: str, day: str, hour: str, minute: str, sign: str | None, hours: str, minutes: str
) -> int:
    """When a minute begins, seconds since the year 2000. Raises `ValueError`, `OverflowError`."""
    moment = datetime(int(year), int(month), int(day), int(hour), int(minute), tzinfo=UTC)
    if sign:
        if int(hours) > 23 or int(minutes) > 59:
            raise ValueError
        shift = timedelta(hours=int(hours), minutes=int(minutes))
        moment += -shift if sign == "+" else shift
    since = moment - _EPOCH
    return since.days * 86_400 + since.seconds
