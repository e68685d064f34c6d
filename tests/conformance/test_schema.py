"""One schema: both backends emit every declared boundary, with the same parents, attributes and types."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from lab.observe.boundaries import BOUNDARIES
from lab.observe.identity import RunInfo, workload_id
from lab.observe.recorder import Recorder
from lab.observe.spans import SpanRow, check, spans
from real_engine.models.loading import LoadedModel
from tests.conformance.sides import Setting, conversation, run_real, run_replayed

Shape = tuple[str, str | None, tuple[tuple[str, str], ...]]


def rows(recorder: Recorder, backend: str) -> list[SpanRow]:
    info = RunInfo(
        backend=backend,  # type: ignore[arg-type]
        clock="stepped" if backend == "real" else "virtual",
        evidence="measured" if backend == "real" else "replayed",
        workload=workload_id(record.request for record in recorder.requests),
        model="tiny",
        policy="fcfs",
        seed=0,
        run=backend,
    )
    return list(spans(recorder, info))


def shapes(found: list[SpanRow]) -> set[Shape]:
    names = {(row.trace_id, row.span_id): row.name for row in found}
    return {
        (
            row.name,
            names[row.trace_id, row.parent_span_id] if row.parent_span_id else None,
            tuple(sorted((key, type(value).__name__) for key, value in row.attributes.items())),
        )
        for row in found
    }


@pytest.fixture(scope="module")
def sides(tiny: LoadedModel) -> tuple[list[SpanRow], list[SpanRow], Recorder]:
    setting, requests = Setting(blocks=45, host_blocks=30), conversation()
    real = run_real(setting, tiny, requests)
    sim, _ = run_replayed(setting, tiny, requests, real)
    return rows(real, "real"), rows(sim, "sim"), real


@pytest.fixture(scope="module")
def compressed(tiny: LoadedModel) -> tuple[list[SpanRow], list[SpanRow]]:
    setting, requests = Setting(compression="tova"), conversation(6)
    real = run_real(setting, tiny, requests)
    sim, _ = run_replayed(setting, tiny, requests, real)
    return rows(real, "real"), rows(sim, "sim")


def test_spans_parents_and_attributes_are_the_same_on_both_sides(
    sides: tuple[list[SpanRow], list[SpanRow], Recorder], compressed: tuple[list[SpanRow], list[SpanRow]]
) -> None:
    for real, sim in (sides[:2], compressed):
        assert shapes(real) == shapes(sim)
        assert {row.span_id for row in real} == {row.span_id for row in sim}


def test_every_declared_boundary_is_emitted_and_every_span_is_declared(
    sides: tuple[list[SpanRow], list[SpanRow], Recorder], compressed: tuple[list[SpanRow], list[SpanRow]]
) -> None:
    for whole, part in zip(sides[:2], compressed, strict=True):
        assert check(whole) | check(part) == set(BOUNDARIES) - {"step.rank"}
        assert "kv.compact" in check(part)


def test_children_lie_inside_their_parents_and_no_interval_is_negative(
    sides: tuple[list[SpanRow], list[SpanRow], Recorder],
) -> None:
    for side in sides[:2]:
        by_id = {(row.trace_id, row.span_id): row for row in side}
        assert len(by_id) == len(side), "span ids are unique"
        for row in side:
            assert row.start_time_unix_nano <= row.end_time_unix_nano
            if row.parent_span_id:
                parent = by_id[row.trace_id, row.parent_span_id]
                assert parent.start_time_unix_nano <= row.start_time_unix_nano
                assert row.end_time_unix_nano <= parent.end_time_unix_nano


def test_ttft_and_the_gaps_between_tokens_add_up_to_the_latency_exactly(
    sides: tuple[list[SpanRow], list[SpanRow], Recorder],
) -> None:
    finished = [record for record in sides[2].requests if record.outcome == "finished"]
    assert finished
    for record in finished:
        times = record.token_times
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert (times[0] - record.request.arrival) + sum(gaps) == record.end - record.request.arrival
        assert record == dataclasses.replace(record)


def test_phases_of_a_step_tile_it(sides: tuple[list[SpanRow], list[SpanRow], Recorder]) -> None:
    for side in sides[:2]:
        steps = {row.span_id: row for row in side if row.name == "step"}
        parts: dict[str, list[SpanRow]] = {}
        for row in side:
            if row.parent_span_id in steps:
                parts.setdefault(row.parent_span_id, []).append(row)
        for span, step in steps.items():
            ordered = sorted(parts[span], key=lambda row: row.start_time_unix_nano)
            assert [row.name for row in ordered] == ["step.plan", "step.execute", "step.commit"]
            assert ordered[0].start_time_unix_nano == step.start_time_unix_nano
            assert ordered[-1].end_time_unix_nano == step.end_time_unix_nano
            assert ordered[0].end_time_unix_nano == ordered[1].start_time_unix_nano
            assert ordered[1].end_time_unix_nano == ordered[2].start_time_unix_nano
