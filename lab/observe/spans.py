"""Turns records into spans, the same way for both backends. Observation path.

Every row is built from its declaration in `lab/observe/boundaries.py`: a span that isn't declared, or an
attribute too many or too few, can't be expressed. Rows are made lazily; nothing is kept.

Times are run nanoseconds on top of `EPOCH_NS`. Ordinals, which make span ids: the n-th of its name within a
request; the step's index within a replica's trace (twice that for `kv.release`, plus one at commit).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lab.control.observer import FleetEvent, RequestRecord, StepRecord
from lab.control.plan import TERMS, RankTiming, Work
from lab.control.request import Request
from lab.observe.boundaries import BOUNDARIES, EPOCH_NS, LINK, Boundary, Value
from lab.observe.identity import SERVICE, RunInfo, gateway_trace, replica_trace, request_trace, span_id
from lab.observe.recorder import Recorded, by_entry


class SpanLink(NamedTuple):
    """From a step to the root span of a request it worked on: how many of its tokens, and in which phase."""

    trace_id: str
    span_id: str
    tokens: int
    phase: str

    @property
    def attributes(self) -> dict[str, Value]:
        return dict(zip(_LINK_NAMES, ("scheduled", self.tokens, self.phase), strict=True))


class Target(NamedTuple):
    """A request as links point at it: its root span, and where its prompt ends."""

    trace_id: str
    span_id: str
    prompt_tokens: int


class SpanRow(NamedTuple):
    """One span. Ids are hex, times are nanoseconds since 1970, `kind` is OpenTelemetry's name for it."""

    trace_id: str
    span_id: str
    parent_span_id: str | None
    name: str
    kind: str
    start_time_unix_nano: int
    end_time_unix_nano: int
    plane: str
    path: str
    attributes: Mapping[str, Value]
    links: tuple[SpanLink, ...] = ()


def spans(recorded: Recorded, info: RunInfo, *, links: bool = True) -> Iterator[SpanRow]:
    """All spans of a run: each request's, in order of arrival, then each step's, then the fleet's.

    `links=False` leaves the links of steps out, for a table that doesn't hold them: it takes half the time.
    """
    return made(recorded, info, _full, links=links)


def made(recorded: Recorded, info: RunInfo, make: Any, *, links: bool = True) -> Iterator[Any]:
    """The same in another form: `make` is called as `_full` is, and what it returns has a `span_id`."""
    targets: dict[str, Target] = {}
    for record in by_entry(recorded.requests):
        targets[record.request.id] = _target(record.request, info)
        yield from request_spans(record, info, make)
    for step in recorded.steps:
        # A run that was cut off may have steps whose requests were never told: the plan introduces them.
        for request in step.plan.new:
            if request.id not in targets:
                targets[request.id] = _target(request, info)
        yield from step_spans(step, info, targets if links else None, make)
    yield from fleet_spans(recorded.fleet, info, make)


def fleet_spans(events: Sequence[FleetEvent], info: RunInfo, make: Any = None) -> Iterator[Any]:
    """A span for each replica that came or went."""
    trace = gateway_trace(info.workload)
    for n, event in enumerate(events):
        about = (event.replica, event.event, event.target, event.reason)
        yield (make or _full)(_SCALE, trace, n, None, event.at, event.at, *about)


def request_spans(record: RequestRecord, info: RunInfo, make: Any = None) -> Iterator[Any]:
    """The root span of one request, then its children in order of time. `make` makes them, in place of `_full`."""
    _row = make or _full
    request, sampling, decision = record.request, record.request.sampling, record.decision
    trace = request_trace(info.workload, request.id)
    finished = record.outcome == "finished"
    arrival = request.arrival
    root = _row(
        _REQUEST,
        trace,
        0,
        None,
        arrival,
        record.end,
        "text_completion",
        SERVICE,
        info.model,
        request.output_limit,
        float(sampling.temperature),
        float(sampling.top_p),
        sampling.top_k,
        sampling.seed,
        len(request.prompt),
        len(record.token_times),
        record.cached_tokens,
        (record.reason,) if finished else None,
        (record.token_times[0] - arrival) / 1e9 if record.token_times else None,
        request.session or None,
        None if finished else record.outcome,
        request.id,
        record.seq,
        record.outcome,
        record.reason,
        request.tenant or None,
        request.priority,
        record.preemptions,
        record.cached_blocks,
        record.computed_tokens,
        record.dropped_tokens or None,
        request.ttft_slo,
        request.tpot_slo,
        decision.replica,
    )
    yield root
    parent = root.span_id
    said = (decision.admitted, decision.admit_reason, decision.ingest_lag)
    yield _row(_ADMIT, trace, 0, parent, arrival, arrival, *said)
    if decision.replica >= 0:
        yield _row(_ROUTE, trace, 0, parent, arrival, arrival, decision.replica, decision.route_reason)
    visits = {"queue": 0, "prefill": 0, "decode": 0}
    for stretch in record.intervals:
        visit = visits[stretch.phase]
        visits[stretch.phase] = visit + 1
        queued = stretch.phase == "queue"
        about = (stretch.cause, visit) if queued else (stretch.first_step, stretch.last_step)
        yield _row(_PHASES[stretch.phase], trace, visit, parent, stretch.start, stretch.end, *about)
    for n, move in enumerate(record.transfers):
        moved = (move.source, move.destination, move.tokens, move.bytes, move.reserved - move.ready)
        times = (move.queue_ns, move.wire_ns)
        yield _row(_TRANSFER, trace, n, parent, move.ready, move.end, None, None, None, *moved, *times)


def step_spans(
    step: StepRecord, info: RunInfo, targets: Mapping[str, Target] | None, make: Any = None
) -> Iterator[Any]:
    """The root span of one step, then what lies in it. `targets`: request id to what links point at."""
    _row = make or _full
    plan, timing = step.plan, step.timing
    index = plan.index
    trace = replica_trace(info.workload, step.replica)
    links = () if targets is None else tuple(_link(work, targets[work.request]) for work in plan.work)
    about = (index, step.replica, step.policy, plan.digest)
    root = _row(_STEP, trace, index, None, step.start, step.end, *about, links=links)
    yield root

    planned = step.start + timing.plan_ns
    row = _row(
        _PLAN,
        trace,
        index,
        root.span_id,
        step.start,
        planned,
        plan.admitted,
        tuple(request for request, _ in plan.preempted),
        tuple(request for request, _ in plan.rejected),
        step.running,
        step.waiting,
        step.blocks_free,
        step.blocks_cached,
        step.blocks_held,
    )
    yield row
    if step.allocated:
        yield _row(_ALLOCATE, trace, index, row.span_id, planned, planned, step.allocated)
    if step.evicted:
        yield _row(_EVICT, trace, index, row.span_id, planned, planned, step.evicted)
    if step.released_plan:
        yield _row(_RELEASE, trace, 2 * index, row.span_id, planned, planned, step.released_plan)

    executed = planned + timing.execute_ns
    row = _row(
        _EXECUTE,
        trace,
        index,
        root.span_id,
        planned,
        executed,
        len(plan.work),
        step.prefill_tokens,
        step.decode_tokens,
        step.context_tokens,
        *(timing.terms or _NO_TERMS),
    )
    yield row
    ready = planned + timing.transfer_ns
    if plan.swap_out or plan.swap_in or plan.copies:
        kinds = (plan.swap_out, plan.swap_in, plan.copies)
        moved = [sum(len(move.pairs) for move in moves) for moves in kinds]
        yield _row(_TRANSFER, trace, index, row.span_id, planned, ready, *moved, *_NO_REPLICAS)
    prepared = ready + timing.prepare_ns
    forwarded = prepared + timing.forward_ns
    samples = plan.samples
    yield _row(_PREPARE, trace, index, row.span_id, ready, prepared)
    yield _row(_FORWARD, trace, index, row.span_id, prepared, forwarded, plan.tokens)
    sampled = forwarded + timing.sample_ns
    yield _row(_SAMPLE, trace, index, row.span_id, forwarded, sampled, samples)
    if plan.compactions:
        blocks = sum(len(item.blocks) for item in plan.compactions)
        lost = (len(plan.compactions), blocks, plan.dropped_tokens)
        yield _row(_COMPACT, trace, index, row.span_id, sampled, executed, *lost)
    for part in step.ranks:
        yield from _rank_spans(_row, part, step, trace, row.span_id, planned, executed)

    row = _row(_COMMIT, trace, index, root.span_id, executed, step.end)
    yield row
    if step.released_commit:
        yield _row(_RELEASE, trace, 2 * index + 1, row.span_id, step.end, step.end, step.released_commit)


def _rank_spans(
    _row: Any, part: RankTiming, step: StepRecord, trace: str, parent: str, start: int, end: int
) -> Iterator[Any]:
    """What one rank did between `start` and `end`; only rounding of clocks could make it longer."""
    ordinal = step.plan.index + (part.rank << 40)
    cuts = [start]
    for phase in (part.transfer_ns, part.prepare_ns, part.forward_ns, part.sample_ns, part.compact_ns):
        cuts.append(min(cuts[-1] + phase, end))
    about = (part.rank, part.tensor, part.pipeline, part.communication_ns, part.down_ns, part.up_ns)
    row = _row(_RANK, trace, ordinal, parent, start, cuts[-1], *about)
    yield row
    if part.rank:
        yield _row(_PREPARE, trace, ordinal, row.span_id, cuts[1], cuts[2])
        yield _row(_FORWARD, trace, ordinal, row.span_id, cuts[2], cuts[3], step.plan.tokens)
        yield _row(_SAMPLE, trace, ordinal, row.span_id, cuts[3], cuts[4], step.plan.samples)


def phase_of(work: Work, prompt_tokens: int) -> str:
    """`decode` when the work extends a generated sequence by one token, else `prefill`."""
    return "decode" if work.tokens == 1 and work.start >= prompt_tokens else "prefill"


def check(rows: Iterable[SpanRow]) -> set[str]:
    """Hold rows against the declarations; returns the names seen. Raises `ValueError` at the first fault.

    Checked: declared name, plane, path and kind; allowed parent; attribute names and types, none missing but
    optional ones; end >= start; inside the parent; unique ids; link attributes. Parents come before children.
    """
    seen: dict[tuple[str, str], SpanRow] = {}
    for row in rows:
        boundary = BOUNDARIES.get(row.name)
        if boundary is None:
            raise ValueError(f"span '{row.name}' is not declared")
        if (row.plane, row.path, row.kind) != (boundary.plane, boundary.path, boundary.kind):
            raise ValueError(f"span '{row.name}' has another plane, path or kind than declared")
        parent = seen.get((row.trace_id, row.parent_span_id)) if row.parent_span_id else None
        if row.parent_span_id and parent is None:
            raise ValueError(f"span '{row.name}' has a parent that no earlier span is")
        inside = parent.name if parent else None
        if inside not in boundary.parents:
            raise ValueError(f"span '{row.name}' lies in '{inside}'; declared: {boundary.parents}")
        if row.end_time_unix_nano < row.start_time_unix_nano:
            raise ValueError(f"span '{row.name}' ends before it starts")
        if parent and not (
            parent.start_time_unix_nano <= row.start_time_unix_nano
            and row.end_time_unix_nano <= parent.end_time_unix_nano
        ):
            raise ValueError(f"span '{row.name}' sticks out of its parent '{parent.name}'")
        _check_attributes(f"span '{row.name}'", row.attributes, dict(boundary.attributes), boundary.optional)
        for link in row.links:
            _check_attributes(f"a link of span '{row.name}'", link.attributes, dict(LINK), frozenset())
        if (row.trace_id, row.span_id) in seen:
            raise ValueError(f"two spans have the id {row.span_id} (the second is '{row.name}')")
        seen[row.trace_id, row.span_id] = row
    return {row.name for row in seen.values()}


_TYPES: dict[str, type] = {"string": str, "int": int, "double": float, "boolean": bool, "string[]": tuple}


def _check_attributes(
    who: str, seen: Mapping[str, Value], declared: Mapping[str, str], optional: frozenset[str]
) -> None:
    for name, value in seen.items():
        if name not in declared:
            raise ValueError(f"{who} has the undeclared attribute '{name}'")
        if type(value) is not _TYPES[declared[name]]:
            raise ValueError(f"{who} has '{name}' = {value!r}; declared as {declared[name]}")
        if isinstance(value, tuple) and not all(type(item) is str for item in value):
            raise ValueError(f"{who} has '{name}' = {value!r}; every item should be a string")
    missing = [name for name in declared if name not in seen and name not in optional]
    if missing:
        raise ValueError(f"{who} lacks the attribute '{missing[0]}'")


def _target(request: Request, info: RunInfo) -> Target:
    trace = request_trace(info.workload, request.id)
    return Target(trace, span_id(trace, "request", 0), len(request.prompt))


def _link(work: Work, target: Target) -> SpanLink:
    phase = phase_of(work, target.prompt_tokens)
    return SpanLink(target.trace_id, target.span_id, work.tokens, phase)


def _full(
    boundary: Boundary,
    trace: str,
    ordinal: int,
    parent: str | None,
    start: int,
    end: int,
    *values: Value | None,
    links: tuple[SpanLink, ...] = (),
) -> SpanRow:
    """A span from its declaration; `values` answer `boundary.attributes` in order, `None` leaves one out."""
    name = boundary.name
    pairs = zip(_NAMES[name], values, strict=True)
    return SpanRow(
        trace,
        span_id(trace, name, ordinal),
        parent,
        name,
        boundary.kind,
        EPOCH_NS + start,
        EPOCH_NS + end,
        boundary.plane,
        boundary.path,
        {key: value for key, value in pairs if value is not None},
        links,
    )


_NAMES = {name: tuple(key for key, _ in boundary.attributes) for name, boundary in BOUNDARIES.items()}
_NO_TERMS = (None,) * len(TERMS)
_LINK_NAMES = tuple(key for key, _ in LINK)
_REQUEST, _ADMIT, _ROUTE = (BOUNDARIES[f"request{part}"] for part in ("", ".admit", ".route"))
_PHASES = {phase: BOUNDARIES[f"request.{phase}"] for phase in ("queue", "prefill", "decode")}
_STEP, _PLAN, _EXECUTE, _COMMIT = (BOUNDARIES[f"step{part}"] for part in ("", ".plan", ".execute", ".commit"))
_PREPARE, _FORWARD, _SAMPLE = (BOUNDARIES[f"step.{part}"] for part in ("prepare", "forward", "sample"))
_ALLOCATE, _EVICT, _RELEASE = (BOUNDARIES[f"kv.{part}"] for part in ("allocate", "evict", "release"))
_RANK = BOUNDARIES["step.rank"]
_NO_REPLICAS = (None,) * 7
_TRANSFER, _COMPACT, _SCALE = (BOUNDARIES[name] for name in ("kv.transfer", "kv.compact", "gateway.scale"))
