"""A run's tables as Parquet: requests, steps, plans, fleet, spans, and the workload itself. Observation path.

The tables are complete: workload, requests, steps and plans together give back the records they were made
from (`lab/analysis/runs.py`), so every span, metric and plot can be computed again from the files. What
columns they have stands in `columns.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from lab.control.observer import Decision, FleetEvent, Interval, RequestRecord, StepRecord, Transfer
from lab.control.plan import TERMS, Compaction, Move, RankTiming, StepPlan, StepTiming, TokenLogprobs, Work
from lab.control.request import Piece, Prompt, Request, SamplingParams, Segment
from lab.errors import RunError
from lab.observe.columns import FLEET, PLANS, REQUESTS, SPANS, STEPS, WORKLOAD
from lab.observe.identity import RunInfo
from lab.observe.parquet import ROW_GROUP, Table, read, write
from lab.observe.recorder import Recorded, by_entry
from lab.observe.spans import SpanRow, fleet_spans

T = TypeVar("T")

BATCH = 4096
"""Records whose spans are made together."""

__all__ = [
    "ROW_GROUP", "WORKLOAD",
    "read_fleet", "read_plans", "read_requests", "read_steps", "read_workload",
    "write_fleet", "write_plans", "write_requests", "write_spans", "write_spans_of", "write_steps", "write_workload",
]  # fmt: skip


def write_workload(path: Path, requests: Iterable[Request]) -> int:
    """Write requests without loss, in order of arrival (equal arrivals stay in order); returns how many."""
    return write(path, sorted(requests, key=lambda request: request.arrival), WORKLOAD)


def write_requests(path: Path, records: Sequence[RequestRecord]) -> int:
    """Write request records, in order of arrival; returns how many."""
    return write(path, by_entry(records), REQUESTS)


def write_steps(path: Path, steps: Iterable[StepRecord]) -> int:
    """Write what each step cost and the state it left; returns how many."""
    return write(path, steps, STEPS)


def write_plans(path: Path, steps: Iterable[StepRecord]) -> int:
    """Write what each step decided, in full; returns how many."""
    return write(path, steps, PLANS)


def write_fleet(path: Path, events: Iterable[FleetEvent]) -> int:
    """Write when replicas started, were ready, drained and went; returns how many events."""
    return write(path, events, FLEET)


def write_spans(path: Path, rows: Iterable[SpanRow]) -> int:
    """Write spans, attributes as JSON with sorted keys; returns how many. Links are the rows of `plans`."""
    return write(path, rows, SPANS)


def write_spans_of(path: Path, recorded: Recorded, info: RunInfo) -> int:
    """Write all spans of a run, made by column: those of `lab.observe.spans`, row for row."""
    from lab.observe.bulk.requests import RequestBatch
    from lab.observe.bulk.steps import StepBatch

    with Table(path, SPANS) as table:
        for records in _batches(by_entry(recorded.requests)):
            table.put_columns(RequestBatch(records).spans(info))
        for steps in _batches(recorded.steps):
            table.put_columns(StepBatch.of(steps).spans(info.workload))
        table.put(fleet_spans(recorded.fleet, info))
    return table.rows


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
                repetition_penalty=row["repetition_penalty"],
                presence_penalty=row["presence_penalty"],
                frequency_penalty=row["frequency_penalty"],
                logit_bias=tuple((item["token"], item["bias"]) for item in row["logit_bias"]),
                min_tokens=row["min_tokens"],
            ),
            tenant=row["tenant"],
            session=row["session"],
            priority=row["priority"],
            ttft_slo=row["ttft_slo_ns"],
            tpot_slo=row["tpot_slo_ns"],
            cache_salt=row["cache_salt"],
            stop=tuple(row["stop"]),
            n=row["n"],
            parent=row["parent"],
            sample=row["sample"],
        )
        for row in read(path, WORKLOAD)
    ]


def read_requests(path: Path, workload: Iterable[Request]) -> list[RequestRecord]:
    """What `write_requests` wrote, with the requests themselves from the workload."""
    known = _known(workload)
    return [
        RequestRecord(
            request=known[row["id"]],
            seq=row["seq"],
            decision=Decision(
                row["admitted"],
                row["admit_reason"],
                row["replica"],
                row["route_reason"],
                row["ingest_lag_ns"],
            ),
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
            predicted_output=row["predicted_output"],
            dropped_tokens=row["dropped_tokens"],
            logprobs=tuple(
                TokenLogprobs(item["chosen"], tuple((top["token"], top["logprob"]) for top in item["top"]))
                for item in row["logprobs"]
            ),
            transfers=tuple(Transfer(**move) for move in row["transfers"]),
        )
        for row in read(path, REQUESTS)
    ]


def read_plans(path: Path, workload: Iterable[Request]) -> list[StepPlan]:
    """What `write_plans` wrote, with the new requests from the workload.

    A table without `reread` is of a run from before it was kept, and is read as one in which nothing was.
    """
    known = _known(workload)
    needed = [column for column in PLANS if column[0] != "reread"]
    return [_plan(row, known) for row in read(path, needed)]


def read_steps(path: Path, plans: Sequence[StepPlan]) -> list[StepRecord]:
    """What `write_steps` wrote; `plans` are the same steps in the same order."""
    same = [item.name for item in fields(StepRecord) if item.name not in ("plan", "timing", "ranks")]
    phases = [item.name for item in fields(StepTiming) if item.name != "terms"]
    terms = [f"{term}_term_ns" for term in TERMS]
    rows = read(path, STEPS)
    if len(rows) != len(plans):
        raise RunError(f"'{path}' has {len(rows)} steps, but there are {len(plans)} plans beside it")
    return [
        StepRecord(
            plan=plan,
            timing=StepTiming(
                **{phase: row[phase] for phase in phases},
                terms=() if row.get(terms[0]) is None else tuple([row[term] for term in terms]),
            ),
            ranks=tuple(RankTiming(**part) for part in row["ranks"]),
            **{name: row[name] for name in same},
        )
        for row, plan in zip(rows, plans, strict=True)
    ]


def read_fleet(path: Path) -> list[FleetEvent]:
    """What `write_fleet` wrote."""
    return [
        FleetEvent(row["at_ns"], row["replica"], row["event"], row["target"], row["reason"])
        for row in read(path, FLEET)
    ]


# -- inside --------------------------------------------------------------------------------------------


def _batches(records: Sequence[T]) -> Iterator[Sequence[T]]:
    for first in range(0, len(records), BATCH):
        yield records[first : first + BATCH]


def _known(workload: Iterable[Request]) -> dict[str, Request]:
    """Requests by id, and the sequences of those that ask for several outputs."""
    return {known.id: known for request in workload for known in (request, *request.sequences())}


def _plan(row: dict[str, Any], known: dict[str, Request]) -> StepPlan:
    columns = ("request", "start", "tokens", "samples", "blocks", "dropped")
    work = zip(*(row[column] for column in columns), strict=True)
    return StepPlan(
        index=row["step"],
        now=row["now_ns"],
        work=tuple(
            Work(request, start, tokens, samples, tuple(blocks), dropped)
            for request, start, tokens, samples, blocks, dropped in work
        ),
        digest=row["digest"],
        new=tuple(known[request] for request in row["new"]),
        admitted=tuple(row["admitted"]),
        preempted=tuple(zip(row["preempted"], row["preempted_how"], strict=True)),
        swap_out=tuple(_unmove(item) for item in row["swap_out"]),
        swap_in=tuple(_unmove(item) for item in row["swap_in"]),
        compactions=tuple(
            Compaction(**{**item, "blocks": tuple(item["blocks"])}) for item in row["compactions"]
        ),
        rejected=tuple(zip(row["rejected"], row["rejected_reason"], strict=True)),
        released=tuple(row["released"]),
        copies=tuple(
            Move(request, tuple(zip(source, copy, strict=True)))
            for request, source, copy in zip(
                row["copy_request"], row["copy_from"], row["copy_to"], strict=True
            )
        ),
        reread=row.get("reread", 0),
    )


def _unpiece(row: dict[str, Any]) -> Piece:
    if row["tokens"] is None:
        return Segment(row["stream"], row["start"], row["length"])
    return tuple(row["tokens"])


def _unmove(row: dict[str, Any]) -> Move:
    return Move(row["request"], tuple(zip(row["device"], row["host"], strict=True)))
