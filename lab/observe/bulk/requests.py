"""Requests by column: the table of requests and their spans, a thousand requests at once. Observation path.

The lists by token (times, output, log-probabilities) are left empty: this is for runs that don't keep them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from itertools import chain
from json.encoder import encode_basestring
from operator import attrgetter
from typing import Any, get_args

import numpy as np

from lab.control.observer import Phase, RequestRecord
from lab.observe.boundaries import BOUNDARIES, Boundary
from lab.observe.bulk import functions
from lab.observe.bulk.spans import CODES, Piece, attributes, hexed, laid_out, quoted, told
from lab.observe.columns import REQUESTS
from lab.observe.identity import SERVICE, RunInfo, request_traces, span_ids
from lab.observe.parquet import arrow_type, empty_lists

PHASES: tuple[Phase, ...] = get_args(Phase)
_QUEUE = PHASES.index("queue")


class RequestBatch:
    """Request records by column; at least one."""

    def __init__(self, records: Sequence[RequestRecord]) -> None:
        self.count, self.records = len(records), records
        self._requests = [record.request for record in records]
        self._decisions = [record.decision for record in records]
        self.numbers: dict[str, Any] = {name: _whole(list(map(get, records))) for name, get in _NUMBERS}
        times = [record.token_times for record in records]
        self.intervals = parts = _Intervals(records)
        self.moves = [move for record in records for move in record.transfers]
        self.numbers |= {
            "first_token_ns": _whole([each[0] if each else -1 for each in times]),
            "last_token_ns": _whole([each[-1] if each else -1 for each in times]),
            "first_scheduled_ns": parts.first_scheduled(),
            **{f"{phase}_ns": parts.spent(phase) for phase in PHASES},
        }
        """Columns; -1 for a time that never was."""

    def columns(self) -> list[Any]:
        """The columns of the table of requests, in the order of `lab.observe.columns.REQUESTS`."""
        import pyarrow as pa

        own, records, parts = self.numbers, self.records, self.intervals
        requests, decisions = self._requests, self._decisions
        said = own | {
            "id": [request.id for request in requests],
            "parent": [request.parent for request in requests],
            "sample": [request.sample for request in requests],
            "tenant": [request.tenant for request in requests],
            "session": [request.session for request in requests],
            "priority": [request.priority for request in requests],
            "outcome": [record.outcome for record in records],
            "reason": [record.reason for record in records],
            "admitted": [decision.admitted for decision in decisions],
            "admit_reason": [decision.admit_reason for decision in decisions],
            "route_reason": [decision.route_reason for decision in decisions],
            **{name: pa.array(own[name], mask=own[name] < 0) for name in _MAYBE_NEVER},
            "ttft_slo_ns": [request.ttft_slo for request in requests],
            "tpot_slo_ns": [request.tpot_slo for request in requests],
            "intervals": parts.lists(),
            "transfers": self._transfers(),
        }
        return [said[name] if name in said else empty_lists(kind, self.count) for name, kind, _ in REQUESTS]

    def _transfers(self) -> Any:
        if not self.moves:
            return empty_lists("transfers", self.count)
        return [[dataclasses.asdict(move) for move in record.transfers] for record in self.records]

    def spans(self, info: RunInfo) -> list[Any]:
        """The columns of their spans, as `lab.observe.spans.request_spans` gives them one by one."""

        own, parts, pieces = self.numbers, self.intervals, list[Piece]()
        traces = request_traces(info.workload, [request.id for request in self._requests])
        halves = np.frombuffer(traces, ">u8")[::2].astype(np.uint64)
        arrival, everyone = own["arrival_ns"], np.arange(self.count)

        def put(boundary: Boundary, rows: Any, ordinals: Any, starts: Any, ends: Any, *values: Any) -> Any:
            """A span of each of the requests `rows`."""
            ids = span_ids(halves[rows], boundary.name, ordinals)
            said = attributes(boundary, len(rows), *values)
            parents = None if boundary is _REQUEST else roots[rows]
            pieces.append(Piece(CODES[boundary.name], rows, ids, parents, starts, ends, said))
            return ids

        roots: Any = None
        roots = put(_REQUEST, everyone, 0 * everyone, arrival, own["end_ns"], *self._about(info))
        admitted = told(["true" if decision.admitted else "false" for decision in self._decisions])
        reasons = quoted([decision.admit_reason for decision in self._decisions])
        put(_ADMIT, everyone, 0 * everyone, arrival, arrival, admitted, reasons, own["ingest_lag_ns"])
        at = np.flatnonzero(own["replica"] >= 0)
        if len(at):
            reasons = quoted([self._decisions[n].route_reason for n in at.tolist()])
            put(_ROUTE, at, 0 * at, arrival[at], arrival[at], own["replica"][at], reasons)
        if len(parts.rows):
            pieces.append(parts.piece(halves, roots))
        moves = self.moves
        if moves:
            counts = [len(record.transfers) for record in self.records]
            rows = np.repeat(everyone, counts)
            nth = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
            ready, end = (_whole([getattr(move, name) for move in moves]) for name in ("ready", "end"))
            reserved = _whole([move.reserved for move in moves])
            told_ = {name: _whole([getattr(move, name) for move in moves]) for name in _MOVED}
            moved = (
                *(told_[name] for name in _MOVED[:4]),
                reserved - ready,
                *(told_[name] for name in _MOVED[4:]),
            )
            put(_TRANSFER, rows, nth, ready, end, None, None, None, *moved)
        return laid_out(self.count, pieces, hexed(traces, self.count), everyone.astype(np.int32))

    def _about(self, info: RunInfo) -> tuple[Any, ...]:
        """The attributes of `request`, in the order of their declaration."""
        import pyarrow as pa

        own, records, requests = self.numbers, self.records, self._requests
        samplings = {id(request.sampling): request.sampling for request in requests}
        drawn = {
            key: [json.dumps(value) for value in (float(s.temperature), float(s.top_p), s.top_k, s.seed)]
            for key, s in samplings.items()
        }
        by_request = (
            [drawn[id(request.sampling)] for request in requests] if len(drawn) > 1 else [*drawn.values()]
        )
        first = [
            repr((record.token_times[0] - record.request.arrival) / 1e9) if record.token_times else None
            for record in records
        ]
        finished = [record.outcome == "finished" for record in records]
        reasons = [encode_basestring(record.reason) for record in records]
        dropped = own["dropped_tokens"]
        return (
            '"text_completion"',
            encode_basestring(SERVICE),
            encode_basestring(info.model),
            told([str(request.output_limit) for request in requests]),
            *(told(texts) for texts in zip(*by_request, strict=True)),
            own["prompt_tokens"],
            own["output_tokens"],
            own["cached_tokens"],
            told([f"[{reason}]" if done else None for reason, done in zip(reasons, finished, strict=True)]),
            told(first),
            quoted([request.session for request in requests], optional=True),
            quoted(
                ["" if record.outcome == "finished" else record.outcome for record in records], optional=True
            ),
            quoted([request.id for request in requests]),
            own["seq"],
            quoted([record.outcome for record in records]),
            told(reasons),
            quoted([request.tenant for request in requests], optional=True),
            told([str(request.priority) for request in requests]),
            own["preemptions"],
            own["cached_blocks"],
            own["computed_tokens"],
            pa.array(dropped, mask=dropped == 0) if dropped.any() else None,
            _maybe([request.ttft_slo for request in requests]),
            _maybe([request.tpot_slo for request in requests]),
            own["replica"],
        )


class _Intervals:
    """All intervals of a batch of requests, one after another."""

    def __init__(self, records: Sequence[RequestRecord]) -> None:
        self._parts = parts = list(chain.from_iterable([record.intervals for record in records]))
        self._counts = np.array([len(record.intervals) for record in records], np.int64)
        self._before = np.cumsum(self._counts) - self._counts
        self.rows = np.repeat(np.arange(len(records)), self._counts)
        self._phases = [part.phase for part in parts]
        codes = {phase: code for code, phase in enumerate(PHASES)}
        self._phase = np.array([codes[phase] for phase in self._phases], np.int64)
        self._start, self._end = _whole([part.start for part in parts]), _whole([part.end for part in parts])
        self._first = _whole([part.first_step for part in parts])
        self._last = _whole([part.last_step for part in parts])
        self._causes = [part.cause for part in parts]

    def spent(self, phase: Phase) -> Any:
        """All time in one phase, by request."""
        own = self._phase == PHASES.index(phase)
        spent = np.zeros(len(self._counts), np.int64)
        np.add.at(spent, self.rows[own], (self._end - self._start)[own])
        return spent

    def first_scheduled(self) -> Any:
        """When each request first ran; -1 where it never did."""

        ran = np.flatnonzero(self._phase != _QUEUE)
        rows, first = np.unique(self.rows[ran], return_index=True)
        when = np.full(len(self._counts), -1)
        when[rows] = self._start[ran[first]]
        return when

    def lists(self) -> Any:
        """The column of the table of requests."""
        import pyarrow as pa

        kind = arrow_type("intervals")
        columns = (self._phases, self._start, self._end, self._causes, self._first, self._last)
        fields = [kind.value_type.field(n) for n in range(len(columns))]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, fields, strict=True)]
        places = np.append(self._before, len(self.rows)).astype(np.int32)
        return pa.ListArray.from_arrays(
            pa.array(places), pa.StructArray.from_arrays(arrays, fields=fields), type=kind
        )

    def piece(self, halves: Any, roots: Any) -> Piece:
        """A span of each."""
        import pyarrow as pa

        count = len(self.rows)
        names, ids = np.empty(count, np.int32), np.empty(count, np.uint64)
        said, order = [], np.empty(count, np.int64)
        done = 0
        for code, phase in enumerate(PHASES):
            own = self._phase == code
            at = np.flatnonzero(own)
            if not len(at):
                continue
            boundary, rows = BOUNDARIES[f"request.{phase}"], self.rows[at]
            visits = np.cumsum(own) - own
            visit = (visits - visits[self._before[self.rows]])[at]
            names[at], ids[at] = CODES[boundary.name], span_ids(halves[rows], boundary.name, visit)
            about = (quoted([self._causes[n] for n in at.tolist()]), visit)
            said.append(
                attributes(
                    boundary, len(at), *(about if code == _QUEUE else (self._first[at], self._last[at]))
                )
            )
            order[at] = np.arange(done, done + len(at))
            done += len(at)
        texts = functions.taken(pa.concat_arrays(said), order)
        return Piece(names, self.rows, ids, roots[self.rows], self._start, self._end, texts)


def _whole(values: Sequence[int]) -> Any:
    return np.array(values, dtype=np.int64)


def _maybe(values: Sequence[int | None]) -> Any:
    import pyarrow as pa

    return pa.array(values, pa.int64()) if any(value is not None for value in values) else None


_NUMBERS = (
    ("seq", attrgetter("seq")),
    ("arrival_ns", attrgetter("request.arrival")),
    ("end_ns", attrgetter("end")),
    ("replica", attrgetter("decision.replica")),
    ("ingest_lag_ns", attrgetter("decision.ingest_lag")),
    ("prompt_tokens", lambda record: len(record.request.prompt)),
    ("output_tokens", lambda record: len(record.token_times)),
    ("cached_tokens", attrgetter("cached_tokens")),
    ("cached_blocks", attrgetter("cached_blocks")),
    ("computed_tokens", attrgetter("computed_tokens")),
    ("preemptions", attrgetter("preemptions")),
    ("predicted_output", attrgetter("predicted_output")),
    ("dropped_tokens", attrgetter("dropped_tokens")),
)
_MAYBE_NEVER = ("first_scheduled_ns", "first_token_ns", "last_token_ns")
_MOVED = ("source", "destination", "tokens", "bytes", "queue_ns", "wire_ns")
_REQUEST, _ADMIT, _ROUTE = (BOUNDARIES[f"request{part}"] for part in ("", ".admit", ".route"))
_TRANSFER = BOUNDARIES["kv.transfer"]
