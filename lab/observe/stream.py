"""A run's tables, written while it goes: memory holds what is live and a few buffers. Observation path.

For simulations of very many requests (`run.record=requests`, `steps`). What each request was like is written and
added up, and then forgotten; steps are summed up, or (`steps`) written too. Rows come in the order in which
requests ended. The times of single tokens, and what each step was made of, aren't kept: such a run can't be
replayed or joined step by step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.control.observer import FleetEvent, Observer, RequestRecord, StepRecord, StepRow, StepTotals, row_of
from lab.observe.columns import FLEET, REQUESTS, SPANS, STEPS
from lab.observe.identity import RunInfo
from lab.observe.parquet import Table, write
from lab.observe.spans import fleet_spans
from lab.observe.tally import Tally

BUFFER = 1024
"""Records that wait to be written together."""


class Stream(Observer):
    """Writes requests, their spans and (`steps`) each step with its spans into a directory, and adds up metrics.

    Files have temporary names until `close`.
    """

    wants_work = False

    def __init__(self, folder: Path, info: RunInfo, *, block_size: int, steps: bool = False) -> None:
        # Arrow's own allocators keep what was freed: 20 to 35 MB here. Read once, when pyarrow is imported.
        os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
        self.wants_steps = steps
        self.tally = Tally(block_size, fold=True)
        self.sums: dict[int, StepTotals] = {}
        self.fleet: list[FleetEvent] = []
        self._folder, self._info = folder, info
        self._records: list[RequestRecord] = []
        self._steps: list[StepRow] = []
        self._files: dict[str, Path] = {}
        self._requests: Table[Any] = Table(self._temporary("requests.parquet"), REQUESTS, 8 * BUFFER)
        self._spans: Table[Any] = Table(self._temporary("spans.parquet"), SPANS, 16 * BUFFER)
        self._table: Table[Any] | None = None
        if steps:
            self._table = Table(self._temporary("steps.parquet"), STEPS, 32 * BUFFER)  # many columns

    def totals(self, replica: int) -> StepTotals:
        return self.sums.setdefault(replica, StepTotals())

    def on_request(self, record: RequestRecord) -> None:
        self._records.append(record)
        if len(self._records) >= BUFFER:
            self._write_requests()

    def step_rows(self) -> Callable[[StepRow], object] | None:
        return self.on_row

    def on_step(self, step: StepRecord) -> None:
        self.on_row(row_of(step))

    def on_row(self, row: StepRow) -> None:
        """A step was committed."""
        self._steps.append(row)
        if len(self._steps) >= 4 * BUFFER:
            self._write_steps()

    def on_fleet(self, event: FleetEvent) -> None:
        self.fleet.append(event)

    @property
    def ended(self) -> int:
        """Requests told so far."""
        return self.tally.requests + len(self._records)

    def close(self) -> None:
        """Write what waits and put the files in place."""
        self._write_requests()
        self._write_steps()
        if self.fleet:
            self._spans.put(fleet_spans(self.fleet, self._info))
        for table in (self._requests, self._spans, self._table):
            if table is not None:
                table.close()
        write(self._temporary("fleet.parquet"), self.fleet, FLEET)
        for name, path in self._files.items():
            os.replace(path, self._folder / name)
        self._files.clear()

    def abandon(self) -> None:
        """Take temporary files away."""
        for path in self._files.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _temporary(self, name: str) -> Path:
        path = self._folder / f".{name}.{os.getpid()}.tmp"
        self._files[name] = path
        return path

    def _write_requests(self) -> None:
        records, self._records = self._records, []
        if records:
            from lab.observe.bulk.requests import RequestBatch

            batch = RequestBatch(records)
            self.tally.add_batch(batch)
            self._requests.put_columns(batch.columns())
            self._spans.put_columns(batch.spans(self._info))

    def _write_steps(self) -> None:
        steps, self._steps = self._steps, []
        if steps and self._table is not None:
            from lab.observe.bulk.steps import StepBatch

            batch = StepBatch(steps)
            del steps
            batch.add_to(self.totals)
            self._table.put_columns(batch.columns())
            self._spans.put_columns(batch.spans(self._info.workload))
