"""A run's tables, written while it goes: memory holds what is live and a few buffers. Observation path.

For simulations of very many requests (`run.record=requests`, `steps`). What each request was like is written and
added up, and then forgotten; steps are summed up, or (`steps`) written too. Rows come in the order in which
requests ended. The times of single tokens, and what each step was made of, aren't kept: such a run can't be
replayed or joined step by step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.control.observer import FleetEvent, Observer, RequestRecord, StepRecord, StepTotals
from lab.observe.columns import FLEET, REQUESTS, SPANS, STEPS
from lab.observe.identity import RunInfo
from lab.observe.metrics import Tally
from lab.observe.packed import packed
from lab.observe.parquet import Column, Table, write
from lab.observe.spans import fleet_spans, request_spans, step_spans

BUFFER = 1024
"""Records that wait to be written together."""

_LEFT_OUT = {"token_times_ns": (), "output": (), "logprobs": ()}

STREAMED: tuple[Column[RequestRecord], ...] = tuple(
    (name, kind, (lambda record: ()) if name in _LEFT_OUT else get) for name, kind, get in REQUESTS
)
"""The columns of requests; the lists by token are empty."""


class Stream(Observer):
    """Writes requests, their spans and (`steps`) each step with its spans into a directory, and adds up metrics.

    Files have temporary names until `close`.
    """

    wants_work = False

    def __init__(self, folder: Path, info: RunInfo, *, block_size: int, steps: bool = False) -> None:
        self.wants_steps = steps
        self.tally = Tally(block_size, fold=True)
        self.sums: dict[int, StepTotals] = {}
        self.fleet: list[FleetEvent] = []
        self._folder, self._info = folder, info
        self._records: list[RequestRecord] = []
        self._steps: list[StepRecord] = []
        self._files: dict[str, Path] = {}
        self._requests: Table[Any] = Table(self._temporary("requests.parquet"), STREAMED, 8 * BUFFER)
        self._spans: Table[Any] = Table(self._temporary("spans.parquet"), SPANS, 8 * BUFFER)
        self._table: Table[Any] | None = None
        if steps:
            self._table = Table(self._temporary("steps.parquet"), STEPS, 8 * BUFFER)

    def totals(self, replica: int) -> StepTotals:
        return self.sums.setdefault(replica, StepTotals())

    def on_request(self, record: RequestRecord) -> None:
        self._records.append(record)
        if len(self._records) >= BUFFER:
            self._write_requests()

    def on_step(self, step: StepRecord) -> None:
        self._steps.append(step)
        if len(self._steps) >= BUFFER:
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
            self._put_spans(list(fleet_spans(self.fleet, self._info, packed)))
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
            self.tally.add(records)
            self._requests.put(records)
            info = self._info
            self._put_spans([row for record in records for row in request_spans(record, info, packed)])

    def _write_steps(self) -> None:
        steps, self._steps = self._steps, []
        if not steps or self._table is None:
            return
        for step in steps:
            total = self.totals(step.replica)
            blocks = step.blocks_free + step.blocks_cached + step.blocks_held
            total.step(step.start, step.timing.total_ns, blocks, step.blocks_held, step.plan.digest)
            total.decided(step.plan, step.evicted)
        self._table.put(steps)
        info = self._info
        self._put_spans([row for step in steps for row in step_spans(step, info, None, packed)])

    def _put_spans(self, rows: Sequence[Sequence[Any]]) -> None:
        self._spans.put_columns(list(zip(*rows, strict=True)))
