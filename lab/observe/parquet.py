"""Rows to Parquet and back, by a table of columns. Observation path.

The bytes depend on the content alone: fixed writer settings, and nothing of the machine or the time in the
metadata. Rows are converted and written a row group at a time, so memory stays bounded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from importlib.abc import MetaPathFinder
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeAlias, TypeVar

from lab.control.observer import Transfer
from lab.control.plan import RankTiming
from lab.errors import RunError
from lab.observe.boundaries import SCHEMA_VERSION

ROW_GROUP = 65_536
_BATCH = 1_024
"""Rows converted at a time; divides ROW_GROUP. So few that they die young and cost the collector nothing."""

T = TypeVar("T")
Column: TypeAlias = tuple[str, str, Callable[[T], Any]]
"""Name, type (see `arrow_type`), and how to get the value from a row. `unique` strings and `varied` integers seldom
repeat, and `hex` digits never; a `word` is one of few strings, kept by its number until it is written."""


def arrow_type(kind: str) -> Any:
    """The Arrow type of a kind of column."""
    import pyarrow as pa

    if kind.startswith("list<"):
        return pa.list_(arrow_type(kind[len("list<") : -1]))
    if kind == "pieces":
        stream, number = ("stream", pa.uint64()), pa.int64()
        return pa.list_(
            pa.struct([stream, ("start", number), ("length", number), ("tokens", pa.list_(pa.int32()))])
        )
    if kind == "intervals":
        times = [("start_ns", pa.int64()), ("end_ns", pa.int64())]
        steps = [("first_step", pa.int64()), ("last_step", pa.int64())]
        return pa.list_(pa.struct([("phase", pa.string()), *times, ("cause", pa.string()), *steps]))
    if kind == "biases":
        return pa.list_(pa.struct([("token", pa.int64()), ("bias", pa.float64())]))
    if kind == "moves":
        blocks = [("device", pa.list_(pa.int32())), ("host", pa.list_(pa.int32()))]
        return pa.list_(pa.struct([("request", pa.string()), *blocks]))
    if kind == "compactions":
        counts = [(name, pa.int64()) for name in ("tokens", "sinks", "recent")]
        blocks = [("blocks", pa.list_(pa.int32())), *counts]
        return pa.list_(pa.struct([("request", pa.string()), *blocks, ("rule", pa.string())]))
    if kind == "ranks":
        return pa.list_(pa.struct([(field.name, pa.int64()) for field in fields(RankTiming)]))
    if kind == "transfers":
        return pa.list_(pa.struct([(field.name, pa.int64()) for field in fields(Transfer)]))
    if kind == "logprobs":
        top = pa.list_(pa.struct([("token", pa.int32()), ("logprob", pa.float64())]))
        return pa.list_(pa.struct([("chosen", pa.float64()), ("top", top)]))
    if kind in ("string", "unique", "hex"):
        return pa.string()
    if kind == "word":
        return pa.dictionary(pa.int32(), pa.string())
    return {"int64": pa.int64, "varied": pa.int64, "int32": pa.int32, "double": pa.float64, "bool": pa.bool_}[
        kind
    ]()


def empty_lists(kind: str, count: int) -> Any:
    """A column of a kind that is a list, without anything in it."""
    import numpy as np
    import pyarrow as pa

    of = arrow_type(kind)
    nowhere = pa.array(np.zeros(count + 1, np.int32))
    return pa.ListArray.from_arrays(nowhere, pa.array([], of.value_type), type=of)


class _NoPandas(MetaPathFinder):
    """An import system in which pandas isn't installed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "pandas":
            raise ImportError("not now")


def without_pandas() -> None:
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


class Table(Generic[T]):
    """A Parquet file that is written while its rows come: memory holds no more than a row group.

    A context manager; the file can be read once it is closed. OS errors pass through: the caller knows what the
    file is for.
    """

    def __init__(self, path: Path, columns: Sequence[Column[T]], group: int = ROW_GROUP) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        without_pandas()
        self._path, self._columns, self._group = path, columns, group
        self._kinds = [arrow_type(kind) for _, kind, _ in columns]
        said = {"lab.schema.version": str(SCHEMA_VERSION)}
        self._schema = pa.schema(
            [(name, kind) for (name, _, _), kind in zip(columns, self._kinds, strict=True)],
            metadata=said,
        )
        # A dictionary of values that don't repeat is a third more bytes and twice the time (flat tables only), nobody
        # looks for ids by their range nor for words by theirs, and digits pack better with their lengths elsewhere.
        options: dict[str, Any] = {"compression": "zstd", "version": "2.6", "write_batch_size": ROW_GROUP}
        if any(kind in ("unique", "hex") for _, kind, _ in columns):
            repeating = [name for name, kind, _ in columns if kind not in ("unique", "varied", "hex")]
            ordered = [name for name, kind, _ in columns if kind not in ("unique", "hex", "word")]
            apart = {name: "DELTA_LENGTH_BYTE_ARRAY" for name, kind, _ in columns if kind == "hex"}
            options |= {"use_dictionary": repeating, "write_statistics": ordered, "column_encoding": apart}
        self._words = any(kind == "word" for _, kind, _ in columns)
        # Else who reads them would get numbers and a dictionary, not strings.
        options["store_schema"] = not self._words
        self._writer = pq.ParquetWriter(path, self._schema, **options)
        if self._words:
            self._writer.add_key_value_metadata(said)
        self._batches: list[Any] = []
        self._waiting = 0
        self.rows = 0
        """Rows put so far."""

    def put(self, rows: Iterable[T]) -> None:
        """More rows. They are converted at once."""
        import pyarrow as pa

        source = iter(rows)
        while rows_now := list(islice(source, min(_BATCH, self._group - self._waiting))):
            arrays = []
            for (name, _, get), kind in zip(self._columns, self._kinds, strict=True):
                try:
                    arrays.append(pa.array([get(row) for row in rows_now], kind))
                except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
                    raise self._unfit(name, error) from error
            self._add(pa.RecordBatch.from_arrays(arrays, schema=self._schema))

    def put_columns(self, columns: Sequence[Any]) -> None:
        """More rows, by column: sequences, numpy, or Arrow of the column's type. They stay in one row group."""
        import pyarrow as pa

        arrays = []
        for (name, _, _), kind, values in zip(self._columns, self._kinds, columns, strict=True):
            try:
                arrays.append(values if isinstance(values, pa.Array) else pa.array(values, kind))
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
                raise self._unfit(name, error) from error
        self._add(pa.RecordBatch.from_arrays(arrays, schema=self._schema))

    def _unfit(self, name: str, error: Exception) -> RunError:
        return RunError(f"can't write column '{name}' of '{self._path.name}': {error}")

    def _add(self, batch: Any) -> None:
        self._batches.append(batch)
        self._waiting += len(batch)
        self.rows += len(batch)
        if self._waiting >= self._group:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._batches:
            table = pa.Table.from_batches(self._batches)
            if len(self._batches) > 1 and self._words:
                table = table.unify_dictionaries()  # else the words are looked up once more, one by one
            self._writer.write_table(table, row_group_size=max(self._group, self._waiting))
            self._batches.clear()
            self._waiting = 0

    def close(self) -> None:
        """Write what waits, and the end of the file."""
        self._flush()
        self._writer.close()

    def __enter__(self) -> Table[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._writer.close()


def write(path: Path, rows: Iterable[T], columns: Sequence[Column[T]]) -> int:
    """Write rows a row group at a time. OS errors pass through: the caller knows what the file is for."""
    with Table(path, columns) as table:
        table.put(rows)
    return table.rows


def in_memory(rows: Sequence[T], columns: Sequence[Column[T]]) -> Any:
    """The rows as an Arrow table that no file has."""
    import pyarrow as pa

    kinds = [(name, arrow_type(kind)) for name, kind, _ in columns]
    return pa.table([[get(row) for row in rows] for _, _, get in columns], schema=pa.schema(kinds))


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
