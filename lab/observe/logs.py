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
        self._traces: dict[int, str] = {}
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
        text = "".join(
            self._step(record) if isinstance(record, StepRecord) else self._request(record)
            for record in waiting
        )
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

    def _trace(self, replica: int) -> str:
        trace = self._traces.get(replica)
        if trace is None:
            trace = self._traces[replica] = replica_trace(self._workload, replica)
        return trace

    # The two kinds of lines that there are many of are written out: an encoder takes three times as long, and
    # formatting is most of what recording costs. Their values are integers, and words without anything to escape.

    def _step(self, step: StepRecord) -> str:
        plan = step.plan
        index, replica, trace = plan.index, step.replica, self._trace(step.replica)
        text = self._decided(step, trace) if plan.preempted or plan.rejected else ""
        if self._lowest > LEVELS["DEBUG"]:
            return text
        return (
            f'{text}{{"ts_ns":{step.end},"level":"DEBUG","stage":"step","step":{index},"replica":{replica},'
            f'"event":"committed","duration_ns":{step.timing.total_ns},"batch_size":{len(plan.work)},'
            f'"prefill_tokens":{step.prefill_tokens},"decode_tokens":{step.decode_tokens},'
            f'"running":{step.running},"waiting":{step.waiting},"blocks_free":{step.blocks_free},'
            f'"trace_id":"{trace}","span_id":"{span_id(trace, "step", index)}"}}\n'
        )

    def _decided(self, step: StepRecord, trace: str) -> str:
        """Lines of those who were preempted or given up in the step."""
        plan = step.plan
        outcomes: tuple[tuple[Level, str, tuple[tuple[str, str], ...]], ...] = (
            ("INFO", "preempted", plan.preempted),
            ("WARNING", "rejected", plan.rejected),
        )
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
            if LEVELS[level] >= self._lowest
            for request, why in pairs
        ]
        return "".join(self._encode(line) + "\n" for line in lines)

    def _request(self, record: RequestRecord) -> str:
        level: Level = "WARNING" if record.outcome in ("rejected", "unfinished") else "INFO"
        if LEVELS[level] < self._lowest:
            return ""
        request = record.request
        trace = request_trace(self._workload, request.id)
        return (
            f'{{"ts_ns":{record.end},"level":"{level}","stage":"request","request_id":{self._encode(request.id)},'
            f'"replica":{record.decision.replica},"event":"{record.outcome}","reason":{self._encode(record.reason)},'
            f'"duration_ns":{record.end - request.arrival},"prompt_tokens":{len(request.prompt)},'
            f'"output_tokens":{len(record.token_times)},"preemptions":{record.preemptions},'
            f'"trace_id":"{trace}","span_id":"{span_id(trace, "request", 0)}"}}\n'
        )
