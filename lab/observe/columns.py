"""What stands in a run's tables: each column's name, type, and how to get its value from a record.

Observation path. `*_ns` are run nanoseconds. Columns beyond the plain records (`batch`, `samples` of steps, the
sums of requests) repeat what the lists say, for whoever reads a single table.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from lab.control.observer import FleetEvent, Interval, RequestRecord, StepRecord
from lab.control.plan import TERMS, Compaction, Move, TokenLogprobs
from lab.control.request import Piece, Request, Segment
from lab.observe import latency
from lab.observe.parquet import Column
from lab.observe.spans import SpanRow

WORKLOAD: tuple[Column[Request], ...] = (
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
    ("stop", "list<string>", lambda r: r.stop),
    ("n", "int64", lambda r: r.n),
    ("parent", "string", lambda r: r.parent),
    ("sample", "int64", lambda r: r.sample),
    ("min_tokens", "int64", lambda r: r.sampling.min_tokens),
    ("repetition_penalty", "double", lambda r: r.sampling.repetition_penalty),
    ("presence_penalty", "double", lambda r: r.sampling.presence_penalty),
    ("frequency_penalty", "double", lambda r: r.sampling.frequency_penalty),
    ("logit_bias", "biases", lambda r: [{"token": t, "bias": b} for t, b in r.sampling.logit_bias]),
)

REQUESTS: tuple[Column[RequestRecord], ...] = (
    ("id", "string", lambda r: r.request.id),
    ("seq", "int64", lambda r: r.seq),
    ("parent", "string", lambda r: r.request.parent),
    ("sample", "int64", lambda r: r.request.sample),
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
    ("ingest_lag_ns", "int64", lambda r: r.decision.ingest_lag),
    ("prompt_tokens", "int64", lambda r: len(r.request.prompt)),
    ("output_tokens", "int64", lambda r: len(r.token_times)),
    ("cached_tokens", "int64", lambda r: r.cached_tokens),
    ("cached_blocks", "int64", lambda r: r.cached_blocks),
    ("computed_tokens", "int64", lambda r: r.computed_tokens),
    ("preemptions", "int64", lambda r: r.preemptions),
    ("predicted_output", "int64", lambda r: r.predicted_output),
    ("dropped_tokens", "int64", lambda r: r.dropped_tokens),
    ("first_scheduled_ns", "int64", latency.first_scheduled),
    ("first_token_ns", "int64", lambda r: r.token_times[0] if r.token_times else None),
    ("last_token_ns", "int64", lambda r: r.token_times[-1] if r.token_times else None),
    ("queue_ns", "int64", latency.queue_total_ns),
    ("prefill_ns", "int64", lambda r: latency.phase_ns(r, "prefill")),
    ("decode_ns", "int64", lambda r: latency.phase_ns(r, "decode")),
    ("ttft_slo_ns", "int64", lambda r: r.request.ttft_slo),
    ("tpot_slo_ns", "int64", lambda r: r.request.tpot_slo),
    ("token_times_ns", "list<int64>", lambda r: list(r.token_times)),
    ("intervals", "intervals", lambda r: [_interval(part) for part in r.intervals]),
    ("output", "list<int32>", lambda r: r.output),
    ("logprobs", "logprobs", lambda r: [_logprobs(item) for item in r.logprobs]),
    ("transfers", "transfers", lambda r: [dataclasses.asdict(move) for move in r.transfers]),
)


def _term(place: int) -> Callable[[StepRecord], int | None]:
    """One term of a modelled step; none where the step was measured, or comes from a fit."""
    return lambda s: s.timing.terms[place] if s.timing.terms else None


STEPS: tuple[Column[StepRecord], ...] = (
    ("step", "varied", lambda s: s.plan.index),
    ("replica", "int32", lambda s: s.replica),
    ("policy", "string", lambda s: s.policy),
    ("start_ns", "varied", lambda s: s.start),
    ("plan_ns", "int64", lambda s: s.timing.plan_ns),
    ("prepare_ns", "int64", lambda s: s.timing.prepare_ns),
    ("forward_ns", "varied", lambda s: s.timing.forward_ns),
    ("sample_ns", "int64", lambda s: s.timing.sample_ns),
    ("commit_ns", "int64", lambda s: s.timing.commit_ns),
    ("transfer_ns", "int64", lambda s: s.timing.transfer_ns),
    ("compact_ns", "int64", lambda s: s.timing.compact_ns),
    ("end_ns", "varied", lambda s: s.end),
    ("batch", "int64", lambda s: len(s.plan.work)),
    ("prefill_tokens", "int64", lambda s: s.prefill_tokens),
    ("decode_tokens", "int64", lambda s: s.decode_tokens),
    ("context_tokens", "varied", lambda s: s.context_tokens),
    ("samples", "int64", lambda s: s.plan.samples),
    ("running", "int64", lambda s: s.running),
    ("waiting", "int64", lambda s: s.waiting),
    ("blocks_free", "varied", lambda s: s.blocks_free),
    ("blocks_cached", "varied", lambda s: s.blocks_cached),
    ("blocks_held", "varied", lambda s: s.blocks_held),
    ("allocated", "int64", lambda s: s.allocated),
    ("evicted", "int64", lambda s: s.evicted),
    ("released_plan", "int64", lambda s: s.released_plan),
    ("released_commit", "int64", lambda s: s.released_commit),
    ("preempted", "int64", lambda s: len(s.plan.preempted)),
    ("moved_blocks", "int64", lambda s: s.plan.moved_blocks),
    ("dropped_tokens", "int64", lambda s: s.plan.dropped_tokens),
    ("copied_blocks", "int64", lambda s: s.plan.copied_blocks),
    ("rejected", "int64", lambda s: len(s.plan.rejected)),
    ("digest", "hex", lambda s: s.plan.digest),
    *((f"{term}_term_ns", "int64", _term(place)) for place, term in enumerate(TERMS)),
    ("ranks", "ranks", lambda s: [dataclasses.asdict(part) for part in s.ranks]),
)

PLANS: tuple[Column[StepRecord], ...] = (
    ("step", "int64", lambda s: s.plan.index),
    ("replica", "int32", lambda s: s.replica),
    ("now_ns", "int64", lambda s: s.plan.now),
    ("digest", "string", lambda s: s.plan.digest),
    ("request", "list<string>", lambda s: [work.request for work in s.plan.work]),
    ("start", "list<int64>", lambda s: [work.start for work in s.plan.work]),
    ("tokens", "list<int64>", lambda s: [work.tokens for work in s.plan.work]),
    ("samples", "list<bool>", lambda s: [work.samples for work in s.plan.work]),
    ("blocks", "list<list<int32>>", lambda s: [work.blocks for work in s.plan.work]),
    ("dropped", "list<int64>", lambda s: [work.dropped for work in s.plan.work]),
    ("new", "list<string>", lambda s: [request.id for request in s.plan.new]),
    ("admitted", "list<string>", lambda s: s.plan.admitted),
    ("preempted", "list<string>", lambda s: [request for request, _ in s.plan.preempted]),
    ("preempted_how", "list<string>", lambda s: [how for _, how in s.plan.preempted]),
    ("swap_out", "moves", lambda s: [_move(move) for move in s.plan.swap_out]),
    ("swap_in", "moves", lambda s: [_move(move) for move in s.plan.swap_in]),
    ("compactions", "compactions", lambda s: [_compaction(item) for item in s.plan.compactions]),
    ("rejected", "list<string>", lambda s: [request for request, _ in s.plan.rejected]),
    ("rejected_reason", "list<string>", lambda s: [reason for _, reason in s.plan.rejected]),
    ("released", "list<string>", lambda s: s.plan.released),
    ("copy_request", "list<string>", lambda s: [m.request for m in s.plan.copies]),
    ("copy_from", "list<list<int32>>", lambda s: [[a for a, _ in m.pairs] for m in s.plan.copies]),
    ("copy_to", "list<list<int32>>", lambda s: [[b for _, b in m.pairs] for m in s.plan.copies]),
    ("reread", "int64", lambda s: s.plan.reread),
)

FLEET: tuple[Column[FleetEvent], ...] = (
    ("at_ns", "int64", lambda e: e.at),
    ("replica", "int32", lambda e: e.replica),
    ("event", "string", lambda e: e.event),
    ("target", "int32", lambda e: e.target),
    ("reason", "string", lambda e: e.reason),
)

_attributes = json.JSONEncoder(separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode

SPANS: tuple[Column[SpanRow], ...] = (
    ("trace_id", "word", lambda row: row.trace_id),
    ("span_id", "hex", lambda row: row.span_id),
    ("parent_span_id", "unique", lambda row: row.parent_span_id),
    ("name", "word", lambda row: row.name),
    ("kind", "word", lambda row: row.kind),
    ("start_time_unix_nano", "varied", lambda row: row.start_time_unix_nano),
    ("end_time_unix_nano", "varied", lambda row: row.end_time_unix_nano),
    ("plane", "word", lambda row: row.plane),
    ("path", "word", lambda row: row.path),
    ("attributes", "unique", lambda row: _attributes(row.attributes)),
)


def _piece(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, Segment):
        return {"stream": piece.stream, "start": piece.start, "length": piece.length, "tokens": None}
    return {"stream": None, "start": None, "length": len(piece), "tokens": piece}


def _move(move: Move) -> dict[str, Any]:
    return {
        "request": move.request,
        "device": [device for device, _ in move.pairs],
        "host": [host for _, host in move.pairs],
    }


def _compaction(item: Compaction) -> dict[str, Any]:
    return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}


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
