"""A run's tables as Parquet: requests, steps, plans, spans, and the workload itself. Observation path.

The tables are complete: workload, requests, steps and plans together give back the records they were made
from (`lab/analysis/runs.py`), so every span, metric and plot can be computed again from the files. `*_ns` are
run nanoseconds. The bytes depend on the content alone: fixed writer settings, and nothing of the machine or
the time in the metadata. Rows are converted and written a row group at a time, so memory stays bounded.

Columns beyond the plain records: `batch`, `samples` of steps and the sums of requests repeat what the lists
say, for whoever reads a single table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from importlib.abc import MetaPathFinder
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from lab.control.observer import Decision, Interval, RequestRecord, StepRecord
from lab.control.plan import StepPlan, StepTiming, TokenLogprobs, Work
from lab.control.request import Piece, Prompt, Request, SamplingParams, Segment
from lab.errors import RunError
from lab.observe import metrics
from lab.observe.boundaries import SCHEMA_VERSION
from lab.observe.recorder import by_entry
from lab.observe.spans import SpanRow

ROW_GROUP = 65_536
_BATCH = 1_024
"""Rows converted at a time; divides ROW_GROUP. So few that they die young and cost the collector nothing."""

_T = TypeVar("_T")
_Column = tuple[str, str, Callable[[_T], Any]]
"""Name, type (see `_arrow`; `unique`: a string that seldom repeats), and how to get the value from a row."""

WORKLOAD: tuple[_Column[Request], ...] = (
    ("id", "string", lambda r: r.id),
    ("arrival_ns", "int64", lambda r: r.arrival),
    ("prompt_tokens", "int64", lambda r: len(r.prompt)),
    ("pieces", "pieces", lambda r: [_piece(piece) for piece in r.prompt.pieces]),
    ("max_tokens", "int64", lambda r: r.max_tokens),
    ("output_len", "int64", lambda r: r.output_len),
    ("stop_ids", "list<int32>", lambda r: r.stop_ids),
    ("temperature", "double", lambda r: r.sampling.temperature),
    ("top_k", "int64", lambda r: r.sampling.top_k),
    ("top_p", "double", lambda r: r.sampling.top_p),
    ("min_p", "double", lambda r: r.sampling.min_p),
    ("sampling_seed", "int64", lambda r: r.sampling.seed),
    ("logprobs", "int64", lambda r: r.sampling.logprobs),
    ("tenant", "string", lambda r: r.tenant),
    ("session", "string", lambda r: r.session),
    ("priority", "int64", lambda r: r.priority),
    ("ttft_slo_ns", "int64", lambda r: r.ttft_slo),
    ("tpot_slo_ns", "int64", lambda r: r.tpot_slo),
    ("cache_salt", "string", lambda r: r.cache_salt),
)

REQUESTS: tuple[_Column[RequestRecord], ...] = (
    ("id", "string", lambda r: r.request.id),
    ("seq", "int64", lambda r: r.seq),
    ("tenant", "string", lambda r: r.request.tenant),
    ("session", "string", lambda r: r.request.session),
    ("priority", "int64", lambda r: r.request.priority),
    ("arrival_ns", "int64", lambda r: r.request.arrival),
    ("end_ns", "int64", lambda r: r.end),
    ("outcome", "string", lambda r: r.outcome),
    ("reason", "string", lambda r: r.reason),
    ("replica", "int32", lambda r: r.decision.replica),
    ("admitted", "bool", lambda r: r.decision.admitted),
    ("admit_reason", "string", lambda r: r.decision.admit_reason),
    ("route_reason", "string", lambda r: r.decision.route_reason),
    ("prompt_tokens", "int64", lambda r: len(r.request.prompt)),
    ("output_tokens", "int64", lambda r: len(r.token_times)),
    ("cached_tokens", "int64", lambda r: r.cached_tokens),
    ("cached_blocks", "int64", lambda r: r.cached_blocks),
    ("computed_tokens", "int64", lambda r: r.computed_tokens),
    ("preemptions", "int64", lambda r: r.preemptions),
    ("first_scheduled_ns", "int64", metrics.first_scheduled),
    ("first_token_ns", "int64", lambda r: r.token_times[0] if r.token_times else None),
    ("last_token_ns", "int64", lambda r: r.token_times[-1] if r.token_times else None),
    ("queue_ns", "int64", metrics.queue_total_ns),
    ("prefill_ns", "int64", lambda r: metrics.phase_ns(r, "prefill")),
    ("decode_ns", "int64", lambda r: metrics.phase_ns(r, "decode")),
    ("ttft_slo_ns", "int64", lambda r: r.request.ttft_slo),
    ("tpot_slo_ns", "int64", lambda r: r.request.tpot_slo),
    ("token_times_ns", "list<int64>", lambda r: r.token_times),
    ("intervals", "intervals", lambda r: [_interval(part) for part in r.intervals]),
    ("output", "list<int32>", lambda r: r.output),
    ("logprobs", "logprobs", lambda r: [_logprobs(item) for item in r.logprobs]),
)

STEPS: tuple[_Column[StepRecord], ...] = (
    ("step", "int64", lambda s: s.plan.index),
    ("replica", "int32", lambda s: s.replica),
    ("policy", "string", lambda s: s.policy),
    ("start_ns", "int64", lambda s: s.start),
    ("plan_ns", "int64", lambda s: s.timing.plan_ns),
    ("prepare_ns", "int64", lambda s: s.timing.prepare_ns),
    ("forward_ns", "int64", lambda s: s.timing.forward_ns),
    ("sample_ns", "int64", lambda s: s.timing.sample_ns),
    ("commit_ns", "int64", lambda s: s.timing.commit_ns),
    ("end_ns", "int64", lambda s: s.end),
    ("batch", "int64", lambda s: len(s.plan.work)),
    ("prefill_tokens", "int64", lambda s: s.prefill_tokens),
    ("decode_tokens", "int64", lambda s: s.decode_tokens),
    ("context_tokens", "int64", lambda s: s.context_tokens),
    ("samples", "int64", lambda s: sum(work.samples for work in s.plan.work)),
    ("running", "int64", lambda s: s.running),
    ("waiting", "int64", lambda s: s.waiting),
    ("blocks_free", "int64", lambda s: s.blocks_free),
    ("blocks_cached", "int64", lambda s: s.blocks_cached),
    ("blocks_held", "int64", lambda s: s.blocks_held),
    ("allocated", "int64", lambda s: s.allocated),
    ("evicted", "int64", lambda s: s.evicted),
    ("released_plan", "int64", lambda s: s.released_plan),
    ("released_commit", "int64", lambda s: s.released_commit),
    ("preempted", "int64", lambda s: len(s.plan.preempted)),
    ("rejected", "int64", lambda s: len(s.plan.rejected)),
    ("digest", "string", lambda s: s.plan.digest),
)

PLANS: tuple[_Column[StepRecord], ...] = (
    ("step", "int64", lambda s: s.plan.index),
    ("replica", "int32", lambda s: s.replica),
    ("now_ns", "int64", lambda s: s.plan.now),
    ("digest", "string", lambda s: s.plan.digest),
    ("request", "list<string>", lambda s: [work.request for work in s.plan.work]),
    ("start", "list<int64>", lambda s: [work.start for work in s.plan.work]),
    ("tokens", "list<int64>", lambda s: [work.tokens for work in s.plan.work]),
    ("samples", "list<bool>", lambda s: [work.samples for work in s.plan.work]),
    ("blocks", "list<list<int32>>", lambda s: [work.blocks for work in s.plan.work]),
    ("new", "list<string>", lambda s: [request.id for request in s.plan.new]),
    ("admitted", "list<string>", lambda s: s.plan.admitted),
    ("preempted", "list<string>", lambda s: [request for request, _ in s.plan.preempted]),
    ("preempted_how", "list<string>", lambda s: [how for _, how in s.plan.preempted]),
    ("rejected", "list<string>", lambda s: [request for request, _ in s.plan.rejected]),
    ("rejected_reason", "list<string>", lambda s: [reason for _, reason in s.plan.rejected]),
    ("released", "list<string>", lambda s: s.plan.released),
)

_attributes = json.JSONEncoder(separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode

SPANS: tuple[_Column[SpanRow], ...] = (
    ("trace_id", "string", lambda row: row.trace_id),
    ("span_id", "unique", lambda row: row.span_id),
    ("parent_span_id", "unique", lambda row: row.parent_span_id),
    ("name", "string", lambda row: row.name),
    ("kind", "string", lambda row: row.kind),
    ("start_time_unix_nano", "int64", lambda row: row.start_time_unix_nano),
    ("end_time_unix_nano", "int64", lambda row: row.end_time_unix_nano),
    ("plane", "string", lambda row: row.plane),
    ("path", "string", lambda row: row.path),
    ("attributes", "unique", lambda row: _attributes(row.attributes)),
)


def write_workload(path: Path, requests: Iterable[Request]) -> int:
    """Write requests without loss, in order of arrival (equal arrivals stay in order); returns how many."""
    return _write(path, sorted(requests, key=lambda request: request.arrival), WORKLOAD)


def write_requests(path: Path, records: Sequence[RequestRecord]) -> int:
    """Write request records, in order of arrival; returns how many."""
    return _write(path, by_entry(records), REQUESTS)


def write_steps(path: Path, steps: Iterable[StepRecord]) -> int:
    """Write what each step cost and the state it left; returns how many."""
    return _write(path, steps, STEPS)


def write_plans(path: Path, steps: Iterable[StepRecord]) -> int:
    """Write what each step decided, in full; returns how many."""
    return _write(path, steps, PLANS)


def write_spans(path: Path, rows: Iterable[SpanRow]) -> int:
    """Write spans, attributes as JSON with sorted keys; returns how many. Links are the rows of `plans`."""
    return _write(path, rows, SPANS)


def read_workload(path: Path) -> list[Request]:
    """What `write_workload` wrote. Raises `RunError` when the file isn't that."""
    return [
        Request(
            id=row["id"],
            prompt=Prompt(tuple(_unpiece(piece) for piece in row["pieces"])),
            arrival=row["arrival_ns"],
            max_tokens=row["max_tokens"],
            output_len=row["output_len"],
            stop_ids=tuple(row["stop_ids"]),
            sampling=SamplingParams(
                temperature=row["temperature"],
                top_k=row["top_k"],
                top_p=row["top_p"],
                min_p=row["min_p"],
                seed=row["sampling_seed"],
                logprobs=row["logprobs"],
            ),
            tenant=row["tenant"],
            session=row["session"],
            priority=row["priority"],
            ttft_slo=row["ttft_slo_ns"],
            tpot_slo=row["tpot_slo_ns"],
            cache_salt=row["cache_salt"],
        )
        for row in _read(path, WORKLOAD)
    ]


def read_requests(path: Path, workload: Iterable[Request]) -> list[RequestRecord]:
    """What `write_requests` wrote, with the requests themselves from the workload."""
    known = {request.id: request for request in workload}
    return [
        RequestRecord(
            request=known[row["id"]],
            seq=row["seq"],
            decision=Decision(row["admitted"], row["admit_reason"], row["replica"], row["route_reason"]),
            outcome=row["outcome"],
            reason=row["reason"],
            end=row["end_ns"],
            cached_tokens=row["cached_tokens"],
            cached_blocks=row["cached_blocks"],
            computed_tokens=row["computed_tokens"],
            preemptions=row["preemptions"],
            token_times=tuple(row["token_times_ns"]),
            intervals=tuple(
                Interval(
                    part["phase"],
                    part["start_ns"],
                    part["end_ns"],
                    part["cause"],
                    part["first_step"],
                    part["last_step"],
                )
                for part in row["intervals"]
            ),
            output=tuple(row["output"]),
            logprobs=tuple(
                TokenLogprobs(item["chosen"], tuple((top["token"], top["logprob"]) for top in item["top"]))
                for item in row["logprobs"]
            ),
        )
        for row in _read(path, REQUESTS)
    ]


def read_plans(path: Path, workload: Iterable[Request]) -> list[StepPlan]:
    """What `write_plans` wrote, with the new requests from the workload."""
    known = {request.id: request for request in workload}
    return [_plan(row, known) for row in _read(path, PLANS)]


def read_steps(path: Path, plans: Sequence[StepPlan]) -> list[StepRecord]:
    """What `write_steps` wrote; `plans` are the same steps in the same order."""
    same = [item.name for item in fields(StepRecord) if item.name not in ("plan", "timing")]
    phases = [item.name for item in fields(StepTiming)]
    rows = _read(path, STEPS)
    if len(rows) != len(plans):
        raise RunError(f"'{path}' has {len(rows)} steps, but there are {len(plans)} plans beside it")
    return [
        StepRecord(
            plan=plan,
            timing=StepTiming(**{phase: row[phase] for phase in phases}),
            **{name: row[name] for name in same},
        )
        for row, plan in zip(rows, plans, strict=True)
    ]


# -- inside --------------------------------------------------------------------------------------------


def _plan(row: dict[str, Any], known: dict[str, Request]) -> StepPlan:
    work = zip(row["request"], row["start"], row["tokens"], row["samples"], row["blocks"], strict=True)
    return StepPlan(
        index=row["step"],
        now=row["now_ns"],
        work=tuple(
            Work(request, start, tokens, samples, tuple(blocks))
            for request, start, tokens, samples, blocks in work
        ),
        digest=row["digest"],
        new=tuple(known[request] for request in row["new"]),
        admitted=tuple(row["admitted"]),
        preempted=tuple(zip(row["preempted"], row["preempted_how"], strict=True)),
        rejected=tuple(zip(row["rejected"], row["rejected_reason"], strict=True)),
        released=tuple(row["released"]),
    )


def _piece(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, Segment):
        return {"stream": piece.stream, "start": piece.start, "length": piece.length, "tokens": None}
    return {"stream": None, "start": None, "length": len(piece), "tokens": piece}


def _unpiece(row: dict[str, Any]) -> Piece:
    if row["tokens"] is None:
        return Segment(row["stream"], row["start"], row["length"])
    return tuple(row["tokens"])


def _interval(part: Interval) -> dict[str, Any]:
    return {
        "phase": part.phase,
        "start_ns": part.start,
        "end_ns": part.end,
        "cause": part.cause,
        "first_step": part.first_step,
        "last_step": part.last_step,
    }


def _logprobs(item: TokenLogprobs) -> dict[str, Any]:
    return {"chosen": item.chosen, "top": [{"token": token, "logprob": value} for token, value in item.top]}


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


def _write(path: Path, rows: Iterable[_T], columns: Sequence[_Column[_T]]) -> int:
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


def _read(path: Path, columns: Sequence[_Column[Any]]) -> list[dict[str, Any]]:
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
