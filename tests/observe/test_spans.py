"""Spans hold to their declarations, on any run."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import given

from lab.observe.boundaries import BOUNDARIES, DECLARED, EPOCH_NS, source_line
from lab.observe.identity import request_trace, span_id, workload_id
from lab.observe.recorder import Recorder, by_entry
from lab.observe.spans import SpanRow, check, spans
from tests.observe.made import info_for, make_request, rich, runs


def rows_of(recorder: Recorder, **changes: str) -> list[SpanRow]:
    return list(spans(recorder, info_for(recorder, **changes)))


@given(runs())
def test_every_span_is_as_declared_and_inside_its_parent(recorder: Recorder) -> None:
    rows = rows_of(recorder)
    check(rows)
    assert len(recorder.requests) == sum(row.name == "request" for row in rows)
    assert len(recorder.steps) == sum(row.name == "step" for row in rows)


def test_every_declared_boundary_is_emitted_under_every_declared_parent() -> None:
    rows = rows_of(rich())
    assert check(rows) == set(BOUNDARIES)
    names = {(row.trace_id, row.span_id): row.name for row in rows}
    seen = {(row.name, row.parent_span_id and names[row.trace_id, row.parent_span_id]) for row in rows}
    assert seen == {(boundary.name, parent) for boundary in DECLARED for parent in boundary.parents}


def test_every_declared_attribute_occurs() -> None:
    seen = defaultdict(set)
    for row in rows_of(rich()):
        seen[row.name] |= set(row.attributes)
    assert seen == {name: {key for key, _ in boundary.attributes} for name, boundary in BOUNDARIES.items()}


@given(runs())
def test_phases_tile_a_request_and_a_step_without_gap_or_overlap(recorder: Recorder) -> None:
    children = defaultdict(list)
    rows = rows_of(recorder)
    for row in rows:
        children[row.trace_id, row.parent_span_id].append(row)
    tiles = {
        "request": {"request.queue", "request.prefill", "request.decode"},
        "step": {"step.plan", "step.execute", "step.commit"},
        "step.execute": {"kv.transfer", "step.prepare", "step.forward", "step.sample", "kv.compact"},
    }
    for row in rows:
        if row.name in tiles:
            inside = [child for child in children[row.trace_id, row.span_id] if child.name in tiles[row.name]]
            at = row.start_time_unix_nano
            for child in inside:
                assert child.start_time_unix_nano == at
                at = child.end_time_unix_nano
            assert at == row.end_time_unix_nano


@given(runs())
def test_spans_last_as_long_as_what_they_show(recorder: Recorder) -> None:
    lasted = defaultdict(list)
    rows = rows_of(recorder)
    ranks = {(row.trace_id, row.span_id) for row in rows if row.name == "step.rank"}
    for row in rows:
        if (row.trace_id, row.parent_span_id or "") in ranks:
            continue  # of another rank
        lasted[row.name].append(row.end_time_unix_nano - row.start_time_unix_nano)
    for name in ("plan", "prepare", "forward", "sample", "commit"):
        assert lasted[f"step.{name}"] == [getattr(step.timing, f"{name}_ns") for step in recorder.steps]
    assert len(ranks) == sum(len(step.ranks) for step in recorder.steps)
    assert lasted["step"] == [step.timing.total_ns for step in recorder.steps]
    for phase in ("queue", "prefill", "decode"):
        told = (part for record in by_entry(recorder.requests) for part in record.intervals)
        assert lasted[f"request.{phase}"] == [part.end - part.start for part in told if part.phase == phase]


@given(runs())
def test_both_backends_emit_the_same_spans_under_the_same_ids(recorder: Recorder) -> None:
    sim = rows_of(recorder, backend="sim", run="a")
    real = rows_of(recorder, backend="real", clock="stepped", evidence="measured", run="b")
    assert sim == real


@given(runs())
def test_the_order_in_which_requests_end_does_not_matter(recorder: Recorder) -> None:
    other = Recorder()
    other.steps, other.requests, other.fleet = recorder.steps, recorder.requests[::-1], recorder.fleet
    assert rows_of(other) == rows_of(recorder)


def test_another_workload_has_other_traces_and_order_does_not_name_it() -> None:
    requests = [make_request(random.Random(n), n) for n in range(3)]
    name = workload_id(requests)
    assert workload_id(requests[::-1]) == name
    assert workload_id(requests[:2]) != name
    assert request_trace(name, "r1") != request_trace(name, "r2") != request_trace("other", "r2")
    trace = request_trace(name, "r1")
    assert len(trace) == 32
    assert len(span_id(trace, "request", 0)) == 16


@given(runs())
def test_a_step_links_each_request_it_worked_on_to_its_root_span(recorder: Recorder) -> None:
    rows = rows_of(recorder)
    roots = {
        (row.trace_id, row.span_id): row.attributes["lab.request.id"] for row in rows if row.name == "request"
    }
    by_index = {step.plan.index: step for step in recorder.steps}
    for row in rows:
        if row.name != "step":
            assert not row.links
            continue
        step = by_index[row.attributes["lab.step.index"]]  # type: ignore[index]
        linked = [
            (roots[link.trace_id, link.span_id], link.attributes["lab.seq.n_tokens"]) for link in row.links
        ]
        assert linked == [(work.request, work.tokens) for work in step.plan.work]
        tokens: Counter[str] = Counter()
        for link in row.links:
            tokens[str(link.attributes["lab.seq.phase"])] += int(link.attributes["lab.seq.n_tokens"])  # type: ignore[arg-type]
        assert (tokens["prefill"], tokens["decode"]) == (step.prefill_tokens, step.decode_tokens)


def test_rejected_requests_have_their_admission_and_no_route_when_the_gateway_refused() -> None:
    recorder = rich()
    rows = rows_of(recorder)
    refused = {record.request.id for record in recorder.requests if not record.decision.admitted}
    assert refused
    traces = {row.trace_id for row in rows if row.attributes.get("lab.request.id") in refused}
    names = Counter(row.name for row in rows if row.trace_id in traces)
    assert names["request"] == names["request.admit"] == len(refused)
    assert names["request.route"] == 0


def test_times_are_run_time_on_a_calendar_that_is_not_1970() -> None:
    recorder = rich()
    starts = [row.start_time_unix_nano for row in rows_of(recorder) if row.name == "request"]
    assert starts == sorted(EPOCH_NS + record.request.arrival for record in recorder.requests)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"name": "request.swap"}, "not declared"),
        ({"plane": "data"}, "another plane"),
        ({"end_time_unix_nano": 0}, "before it starts"),
        ({"parent_span_id": "0" * 16}, "no earlier span"),
        ({"parent_span_id": None}, "lies in 'None'"),
        ({"start_time_unix_nano": 0}, "sticks out"),
        ({"attributes": {}}, "lacks"),
        ({"attributes": {"lab.admit.admitted": 1, "lab.admit.reason": ""}}, "declared as boolean"),
        ({"attributes": {"lab.admit.admitted": True, "lab.admit.reason": "", "x": 1}}, "undeclared"),
    ],
)
def test_check_finds_what_is_wrong(change: dict[str, Any], complaint: str) -> None:
    rows = rows_of(rich())[:2]
    assert rows[1].name == "request.admit"
    with pytest.raises(ValueError, match=complaint):
        check([rows[0], rows[1]._replace(**change)])


def test_check_finds_two_spans_with_one_id() -> None:
    rows = rows_of(rich())
    with pytest.raises(ValueError, match="two spans"):
        check([rows[0], rows[0]])


@pytest.mark.parametrize("boundary", DECLARED, ids=lambda boundary: boundary.name)
def test_the_code_that_emits_a_boundary_is_where_the_declaration_says(boundary: object) -> None:
    path, line = source_line(boundary)  # type: ignore[arg-type]
    name = boundary.emitted_at.rpartition(".")[2].rpartition(":")[2]  # type: ignore[attr-defined]
    assert f"def {name}(" in path.read_text(encoding="utf-8").splitlines()[line - 1]
