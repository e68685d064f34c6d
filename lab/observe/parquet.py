"""Rows to Parquet and back, by a table of columns. Observation path.

The bytes depend on the content alone: fixed writer settings, and nothing of the machine or the time in the
metadata. Rows are converted and written a row group at a time, so memory stays bounded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import MetaPathFinder
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from lab.errors import RunError
from lab.observe.boundaries import SCHEMA_VERSION

ROW_GROUP = 65_536
_BATCH = 1_024
"""Rows converted at a time; divides ROW_GROUP. So few that they die young and cost the collector nothing."""

T = TypeVar("T")
Column: TypeAlias = tuple[str, str, Callable[[T], Any]]
"""Name, type (see `_arrow`; `unique`: a string that seldom repeats), and how to get the value from a row."""


def _arrow(kind: str) -> Any:
    import pyarrow as pa

    if kind.startswith("list<"):
        return pa.list_(_arrow(kind[len("list<") : -1]))
    if kind == "pieces":
        stream, number = ("stream", pa.uint64()), pa.int64()
        return pa.list_(
            pa.struct([stream, ("start", number), ("length", number), ("tokens", pa.list_(pa.int32()))])
        )
    if kind == "intervals":
        times = [("start_ns", pa.int64()), ("end_ns", pa.int64())]
        steps = [("first_step", pa.int64()), ("last_step", pa.int64())]
        return pa.list_(pa.struct([("phase", pa.string()), *times, ("cause", pa.string()), *steps]))
    if kind == "moves":
        blocks = [("device", pa.list_(pa.int32())), ("host", pa.list_(pa.int32()))]
        return pa.list_(pa.struct([("request", pa.string()), *blocks]))
    if kind == "compactions":
        counts = [(name, pa.int64()) for name in ("tokens", "sinks", "recent")]
        blocks = [("blocks", pa.list_(pa.int32())), *counts]
        return pa.list_(pa.struct([("request", pa.string()), *blocks, ("rule", pa.string())]))
    if kind == "logprobs":
        top = pa.list_(pa.struct([("token", pa.int32()), ("logprob", pa.float64())]))
        return pa.list_(pa.struct([("chosen", pa.float64()), ("top", top)]))
    if kind in ("string", "unique"):
        return pa.string()
    return {"int64": pa.int64, "int32": pa.int32, "double": pa.float64, "bool": pa.bool_}[kind]()


class _NoPandas(MetaPathFinder):
    """An import system in which pandas isn't installed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "pandas":
            raise ImportError("not now")


def _without_pandas() -> None:
    """Keep pyarrow from importing pandas (half a second) just to ask whether a list is a Series.

    It asks once a process; told that there is none it takes lists as lists. Whoever needs pandas later, such
    as `to_pandas`, makes it ask again.
    """
    import pyarrow as pa

    if "pandas" not in sys.modules:
        sys.meta_path.insert(0, _NoPandas())
        try:
            pa.array([0])
        finally:
            del sys.meta_path[0]


def write(path: Path, rows: Iterable[T], columns: Sequence[Column[T]]) -> int:
    """Write rows a row group at a time. OS errors pass through: the caller knows what the file is for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _without_pandas()
    kinds = [_arrow(kind) for _, kind, _ in columns]
    schema = pa.schema(
        [(name, kind) for (name, _, _), kind in zip(columns, kinds, strict=True)],
        metadata={"lab.schema.version": str(SCHEMA_VERSION)},
    )
    source, written = iter(rows), 0
    # A dictionary of values that don't repeat is a third more bytes and twice the time (flat tables only).
    unique = any(kind == "unique" for _, kind, _ in columns)
    repeating: Any = [name for name, kind, _ in columns if kind != "unique"] if unique else True
    options = {"compression": "zstd", "version": "2.6", "use_dictionary": repeating}
    with pq.ParquetWriter(path, schema, **options) as writer:
        batches: list[Any] = []
        while rows_now := list(islice(source, _BATCH)):
            arrays = []
            for (name, _, get), kind in zip(columns, kinds, strict=True):
                try:
                    arrays.append(pa.array([get(row) for row in rows_now], kind))
                except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
                    raise RunError(f"can't write column '{name}' of '{path.name}': {error}") from error
            batches.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
            written += len(rows_now)
            if written % ROW_GROUP == 0:
                writer.write_table(pa.Table.from_batches(batches), row_group_size=ROW_GROUP)
                batches.clear()
        if batches:
            writer.write_table(pa.Table.from_batches(batches), row_group_size=ROW_GROUP)
    return written


def read(path: Path, columns: Sequence[Column[Any]]) -> list[dict[str, Any]]:
    """The rows of a table as dicts. Raises `RunError` when the file isn't that table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"can't read '{path}': {str(error).splitlines()[0]}") from error
    missing = [name for name, _, _ in columns if name not in table.column_names]
    if missing:
        raise RunError(f"'{path}' has no column '{missing[0]}'; was it written by another version?")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
