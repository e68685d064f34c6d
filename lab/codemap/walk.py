"""One request of a run, walked through the source span by span. Observation path.

The request's own spans in order of time; below each stretch in which it ran, the first step that worked on it,
opened up, and how many more there were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lab.codemap.stops import stops
from lab.control.observer import RequestRecord, StepRecord
from lab.errors import UnknownNameError
from lab.observe.boundaries import BOUNDARIES, EPOCH_NS, Value
from lab.observe.identity import RunInfo
from lab.observe.recorder import Recorded, by_entry
from lab.observe.source import ROOT, first_sentence, locate
from lab.observe.spans import SpanRow, request_spans, step_spans

if TYPE_CHECKING:
    from lab.analysis.runs import Run

_STEPS = ("request.prefill", "request.decode")
_QUIET = ("lab.plan.digest", "lab.replica", "lab.policy")


def walk(recorded: Recorded, info: RunInfo, request: str = "", root: Path = ROOT) -> str:
    """The walk as text; without a name, of the request with most to show: most preempted, then first to come.

    Raises `UnknownNameError` where the run has no such request.
    """
    records = {record.request.id: record for record in by_entry(recorded.requests)}
    if request and request not in records:
        raise UnknownNameError("request", request, list(records)[:8], f"The run has {len(records)}.")
    record = records.get(request) or max(records.values(), key=lambda record: record.preemptions)
    steps = _steps(record, recorded.steps)
    lines = [f"Request '{record.request.id}' of run '{info.run}': {_life(record)}.", ""]
    for row in request_spans(record, info):
        lines += _shown(row, record, info, root, 0 if row.name == "request" else 1)
        if row.name in _STEPS:
            lines += _worked(row, record, steps, info, root)
    return "\n".join(lines)


def info_of(run: Run) -> RunInfo:
    """Who a run on disk says it is, as far as its spans need it."""
    from lab.analysis.frames import backend
    from lab.observe.identity import workload_id

    said = run.environment
    return RunInfo(
        backend="real" if backend(run) == "real" else "sim",
        clock=said.get("clock", "virtual"),
        evidence=said.get("evidence", "modelled"),
        workload=workload_id(run.workload()),
        model=str(run.config.get("model", {}).get("name", "")),
        policy=str(run.config.get("policy", {}).get("name", "")),
        seed=int(run.config.get("seed", 0)),
        run=str(run.path),
    )


def _life(record: RequestRecord) -> str:
    request = record.request
    preempted = (
        ("never", "once")[record.preemptions] if record.preemptions < 2 else f"{record.preemptions} times"
    )
    return (
        f"{len(request.prompt):,} prompt tokens ({record.cached_tokens:,} of them cached), "
        f"{len(record.token_times):,} generated, {preempted} preempted, {record.outcome}: "
        f"{record.reason}"
    )


def _steps(record: RequestRecord, steps: Sequence[StepRecord]) -> list[StepRecord]:
    """The steps that worked on the request, in order."""
    name, replica = record.request.id, record.decision.replica
    return [
        step
        for step in steps
        if step.replica == replica and any(work.request == name for work in step.plan.work)
    ]


def _worked(
    row: SpanRow, record: RequestRecord, steps: Sequence[StepRecord], info: RunInfo, root: Path
) -> Iterator[str]:
    """The steps of one stretch: the first opened up, the others counted."""
    first, last = row.attributes["lab.step.first"], row.attributes["lab.step.last"]
    assert isinstance(first, int)
    assert isinstance(last, int)
    own = [step for step in steps if first <= step.plan.index <= last]
    if not own:
        return
    work = next(work for work in own[0].plan.work if work.request == record.request.id)
    tokens = f"{work.tokens} token{'s' * (work.tokens != 1)} from position {work.start}"
    with_whom = len(own[0].plan.work) - 1
    yield f"{'':>25}    step {own[0].plan.index} worked on {tokens}, in a batch with {with_whom} other requests:"
    depth: dict[str | None, int] = {None: 2}
    for step_row in step_spans(own[0], info, None):
        depth[step_row.span_id] = depth[step_row.parent_span_id] + 1
        yield from _shown(step_row, record, info, root, depth[step_row.span_id] - 1)
    if len(own) > 1:
        more = (
            f"step {own[1].plan.index}"
            if len(own) == 2
            else f"steps {own[1].plan.index} to {own[-1].plan.index}"
        )
        yield f"{'':>25}    and {len(own) - 1} more like it: {more}"


def _shown(row: SpanRow, record: RequestRecord, info: RunInfo, root: Path, depth: int) -> Iterator[str]:
    """A span: when, how long, its name and what it says; below it, the code whose work it shows."""
    boundary = BOUNDARIES[row.name]
    began = row.start_time_unix_nano - EPOCH_NS - record.request.arrival
    lasted = row.end_time_unix_nano - row.start_time_unix_nano
    at = locate(_code(boundary.emitted_at, info), root)
    pad = "  " * depth
    attributes = ", ".join(f"{key.removeprefix('lab.')} {_value(value)}" for key, value in _telling(row))
    how_long = f"+{lasted / 1e6:.3f} ms" if lasted else "an instant"
    yield f"{began / 1e6:>11.3f} {how_long:>13}  {pad}{row.name}  [{boundary.plane}, {boundary.path}]"
    yield f"{'':>25}  {pad}{at.file}:{at.line} {at.name}: {first_sentence(boundary.doc)}"
    if attributes:
        yield f"{'':>25}  {pad}{attributes}"


def _code(symbol: str, info: RunInfo) -> str:
    """Where a protocol is declared, the code that this run's backend answers it with."""
    for stop in stops():
        if stop.contract == symbol:
            return stop.twin if info.backend == "real" else stop.symbol
    return symbol


def _telling(row: SpanRow) -> Iterator[tuple[str, Value]]:
    """The attributes that say something here; the root's are said in the first line."""
    if row.name == "request":
        return
    for key, value in row.attributes.items():
        if key not in _QUIET and value not in ((), ""):
            yield key, value


def _value(value: Value) -> str:
    if isinstance(value, tuple):
        return "+".join(value[:4]) + (f" and {len(value) - 4} more" if len(value) > 4 else "")
    return str(value).lower() if isinstance(value, bool) else str(value)
