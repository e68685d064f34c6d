"""Structured logs, one JSON object a line, written while the run goes. Observation path.

Each line says `ts_ns` (run time), `level`, `stage` (the name of the boundary), `event`, and what it is about:
`request_id`, `step`, `replica`, `batch_size` and so on. `trace_id` and `span_id` are those of the span that
the line belongs to, so a log line and a bar in a timeline find each other. Nothing in it comes from a wall
clock: two equal simulations write equal logs.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from lab.control.observer import Observer, RequestRecord, StepRecord
from lab.errors import RunError
from lab.observe.identity import RunInfo, replica_trace, request_trace, span_id

Level = Literal["DEBUG", "INFO", "WARNING"]
LEVELS: dict[Level, int] = {"DEBUG": 10, "INFO": 20, "WARNING": 30}


class JsonLog(Observer):
    """Writes `path` line by line; a context manager, so that the last lines land even when the run fails.

    `level` is the lowest that is written: DEBUG has every step, INFO requests and preemptions, WARNING
    refusals and what was cut off. `buffer` is how many records wait before they are formatted and written.
    Raises `RunError` when the file can't be written.
    """

    def __init__(self, path: Path, info: RunInfo, *, level: Level = "DEBUG", buffer: int = 256) -> None:
        self.path = path
        self._workload = info.workload
        self._lowest = LEVELS[level]
        self._buffer = buffer
        self._waiting: list[StepRecord | RequestRecord] = []
        self._encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
        try:
            self._file: IO[str] | None = path.open("w", encoding="utf-8")
        except OSError as error:
            raise self._failed(error) from error

    def on_step(self, step: StepRecord) -> None:
        self._waiting.append(step)
        if len(self._waiting) >= self._buffer:
            self.flush()

    def on_request(self, record: RequestRecord) -> None:
        if self._lowest > LEVELS["INFO"] and record.outcome in ("finished", "aborted"):
            return
        self._waiting.append(record)
        if len(self._waiting) >= self._buffer:
            self.flush()

    def flush(self) -> None:
        """Format and write what waits. After a failure nothing more is tried."""
        waiting, self._waiting = self._waiting, []
        if self._file is None:
            return
        lines: list[dict[str, Any]] = []
        for record in waiting:
            lines += self._step(record) if isinstance(record, StepRecord) else self._request(record)
        text = "".join(self._encode(line) + "\n" for line in lines if LEVELS[line["level"]] >= self._lowest)
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            self._drop()
            raise self._failed(error) from error

    def close(self) -> None:
        """Write the rest and close. May be called twice."""
        try:
            self.flush()
        finally:
            self._drop()

    def __enter__(self) -> JsonLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # told already, by the write that failed
                file.close()

    def _failed(self, error: OSError) -> RunError:
        return RunError(f"can't write the log '{self.path}': {error.strerror or error}")

    def _step(self, step: StepRecord) -> list[dict[str, Any]]:
        plan = step.plan
        trace = replica_trace(self._workload, step.replica)
        outcomes = (("INFO", "preempted", plan.preempted), ("WARNING", "rejected", plan.rejected))
        lines: list[dict[str, Any]] = [
            {
                "ts_ns": plan.now,
                "level": level,
                "stage": "step.plan",
                "step": plan.index,
                "replica": step.replica,
                "event": event,
                "request_id": request,
                "reason": why,
                "trace_id": trace,
                "span_id": span_id(trace, "step.plan", plan.index),
            }
            for level, event, pairs in outcomes
            for request, why in pairs
        ]
        lines.append(
            {
                "ts_ns": step.end,
                "level": "DEBUG",
                "stage": "step",
                "step": plan.index,
                "replica": step.replica,
                "event": "committed",
                "duration_ns": step.timing.total_ns,
                "batch_size": len(plan.work),
                "prefill_tokens": step.prefill_tokens,
                "decode_tokens": step.decode_tokens,
                "running": step.running,
                "waiting": step.waiting,
                "blocks_free": step.blocks_free,
                "trace_id": trace,
                "span_id": span_id(trace, "step", plan.index),
            }
        )
        return lines

    def _request(self, record: RequestRecord) -> list[dict[str, Any]]:
        trace = request_trace(self._workload, record.request.id)
        return [
            {
                "ts_ns": record.end,
                "level": "WARNING" if record.outcome in ("rejected", "unfinished") else "INFO",
                "stage": "request",
                "request_id": record.request.id,
                "replica": record.decision.replica,
                "event": record.outcome,
                "reason": record.reason,
                "duration_ns": record.end - record.request.arrival,
                "prompt_tokens": len(record.request.prompt),
                "output_tokens": len(record.token_times),
                "preemptions": record.preemptions,
                "trace_id": trace,
                "span_id": span_id(trace, "request", 0),
            }
        ]
