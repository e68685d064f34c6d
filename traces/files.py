"""Reading trace files: plain or gzip, line by line, with errors that point at the spot. Request path."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, cast

from lab.errors import TraceError, UnknownNameError

MAX_TOKENS = 1_000_000_000
"""More tokens than any context window: a larger count is a damaged file."""
MAX_SECONDS = 1_000_000_000
"""About 31 years; keeps every arrival inside 63 bits of nanoseconds."""
MAX_NAME = 200

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Place:
    """A spot in a file, for error messages: 1-based line, and the column's name."""

    path: str
    line: int
    column: str = ""

    def error(self, what: str) -> TraceError:
        """`trace 'x.csv', line 3, column 'y': what`."""
        column = f", column '{self.column}'" if self.column else ""
        return TraceError(f"trace file '{self.path}', line {self.line}{column}: {what}")

    def at(self, column: str) -> Place:
        """The same line, at a named column."""
        return Place(self.path, self.line, column)


def describe(path: str) -> dict[str, object]:
    """Provenance of a file: its path as given and the sha256 of its bytes."""
    try:
        with Path(path).expanduser().open("rb") as raw:
            return {"path": path, "sha256": hashlib.file_digest(raw, "sha256").hexdigest()}
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the path; a ~user who isn't there
        raise _unreadable(path, error) from error


def lines(path: str) -> Iterator[tuple[Place, str]]:
    """Every line of a UTF-8 text file, decompressed if its first bytes say gzip, with its place.

    Going by the bytes and not the suffix means that a download a browser has already unpacked still loads.
    """
    number = 0
    try:
        with Path(path).expanduser().open("rb") as raw:
            for data in _unpacked(raw):
                number += 1
                place = Place(path, number)
                try:
                    text = data.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise place.error(f"byte {error.start + 1} isn't UTF-8; expected UTF-8 text") from error
                yield place, text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        broken = Place(path, number + 1)
        raise broken.error(f"the gzip data ends or is damaged here ({error}); download it again") from error
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the path; a ~user who isn't there
        raise _unreadable(path, error) from error


def plain_lines(path: str) -> Iterator[str]:
    """The same lines in less time, for whoever knows a good one at sight: what isn't UTF-8 shows as U+FFFD. Raises one
    of `BROKEN` where the file can't be read on; `lines` says where that is, and why."""
    with Path(path).expanduser().open("rb") as raw:
        yield from io.TextIOWrapper(_unpacked(raw), encoding="utf-8-sig", errors="replace", newline="\n")


BROKEN = (OSError, EOFError, zlib.error, ValueError, RuntimeError)


def _unpacked(raw: BufferedReader) -> IO[bytes]:
    packed = raw.peek(2)[:2] == b"\x1f\x8b"
    return cast(IO[bytes], gzip.GzipFile(fileobj=raw) if packed else raw)


def _unreadable(path: str, error: Exception) -> TraceError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return TraceError(f"trace file '{path}' can't be read: {reason}; set trace.path to a readable file")


def csv_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[Place, dict[str, str]]]:
    """Rows of a CSV file that has at least `columns` in its header, in any order; blank lines are skipped."""
    place = Place(path, 1)

    def text() -> Iterator[str]:
        nonlocal place
        for spot, line in lines(path):
            place = spot
            yield line

    reader = csv.reader(text(), strict=True)
    header: list[str] | None = None
    try:
        for fields in reader:
            if not fields:
                continue
            if header is None:
                header = [name.strip() for name in fields]
                _check_header(place, header, columns)
            elif len(fields) != len(header):
                raise place.error(f"{len(fields)} fields; expected {len(header)} as in the header")
            else:
                yield place, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise place.error(f"not CSV ({error}); expected {','.join(columns)}") from error
    if header is None:
        raise place.error(f"the file is empty; expected a header {','.join(columns)}")


def _check_header(place: Place, header: list[str], columns: Sequence[str]) -> None:
    for name in columns:
        if header.count(name) > 1:
            raise place.at(name).error(f"appears {header.count(name)} times; expected once")
        if name not in header:
            seen = ascii(", ".join(header)[:MAX_NAME])[1:-1]  # a quoted name may hold a line's end
            raise place.at(name).error(f"missing from the header ({seen}); expected {','.join(columns)}")


def json_rows(
    path: str, required: Collection[str], optional: Collection[str] = (), *, closed: bool = False
) -> Iterator[tuple[Place, dict[str, object]]]:
    """Objects of a JSON-lines file, each with the `required` keys; blank lines are skipped.

    `closed` refuses keys that are neither required nor optional: for a format of ours a key nobody reads
    is a typing error, for another's it is an extension.
    """
    for place, line in lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            what = f"not JSON at character {error.colno} ({error.msg}); expected an object"
            raise place.error(what) from error
        except (ValueError, RecursionError) as error:
            raise place.error(f"not JSON that can be read ({error}); expected an object") from error
        if not isinstance(value, dict):
            raise place.error(f"{shown(value)} isn't an object; expected one with {', '.join(required)}")
        for key in required:
            if key not in value:
                raise place.at(key).error(f"missing; expected an object with {', '.join(required)}")
        if closed:
            for key in value:
                if key not in required and key not in optional:
                    raise place.error(str(UnknownNameError("key", shown(key)[1:-1], {*required, *optional})))
        yield place, value


def shown(value: object) -> str:
    """A value as an error message shows it: escaped and cut short."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def integer(place: Place, value: object, low: int, high: int) -> int:
    """A JSON integer, or the plain decimal digits of one, within [low, high]."""
    parsed: int | None = None
    if isinstance(value, str):
        stripped = value.strip(" \t\r\n")
        parsed = int(stripped) if _INTEGER.fullmatch(stripped) else None
    elif isinstance(value, int) and not isinstance(value, bool):
        parsed = value
    if parsed is None or not low <= parsed <= high:
        raise place.error(f"{shown(value)}; expected an integer from {low} to {high}")
    return parsed


def number(place: Place, value: object, low: float, high: float) -> float:
    """A finite JSON number, or the plain decimal text of one, within [low, high]."""
    parsed = math.nan
    if isinstance(value, str):
        stripped = value.strip(" \t\r\n")
        parsed = float(stripped) if _DECIMAL.fullmatch(stripped) else math.nan
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        parsed = float(value) if abs(value) < 1e300 else math.nan
    if not low <= parsed <= high:
        raise place.error(f"{shown(value)}; expected a number from {low:g} to {high:g}")
    return parsed


def name(place: Place, value: object) -> str:
    """A tenant, session or system name: printable, so that it can go into files and hashes as it is."""
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= MAX_NAME:
        raise place.error(f"{shown(value)}; expected 1 to {MAX_NAME} printable characters")
    return value


def tokens(place: Place, row: Mapping[str, object], column: str) -> int:
    """A token count, at least 1: a request with no prompt or no output can't be served."""
    value = row[column]
    if isinstance(value, str) and value.isdecimal() and value.isascii() and 0 < len(value) < 10:
        count = int(value)  # as `integer` would, without the place that only an error needs
        if count:
            return count
    return integer(place.at(column), value, 1, MAX_TOKENS)
