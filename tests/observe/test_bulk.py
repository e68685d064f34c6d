"""What is made by column holds what is made row by row."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from lab.control.observer import StepTotals
from lab.control.plan import RankTiming, StepTiming
from lab.control.request import Request, SamplingParams
from lab.observe import export
from lab.observe.bulk.requests import RequestBatch
from lab.observe.bulk.steps import StepBatch
from lab.observe.columns import REQUESTS, SPANS, STEPS
from lab.observe.identity import request_trace, span_id, span_ids
from lab.observe.parquet import Table, write
from lab.observe.recorder import Recorder
from lab.observe.spans import spans
from lab.observe.tally import Tally
from tests.observe.made import info_for, play, rich, runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bulk")


def check(recorder: Recorder, folder: Path) -> None:
    info = info_for(recorder)
    export.write_spans(folder / "rows", spans(recorder, info, links=False))
    assert export.write_spans_of(folder / "columns", recorder, info) == sum(1 for _ in spans(recorder, info))
    rows, columns = (pq.read_table(folder / kind) for kind in ("rows", "columns"))
    assert columns.to_pylist() == rows.to_pylist()
    assert columns.schema.equals(rows.schema, check_metadata=True)
    if recorder.steps:
        write(folder / "rows", recorder.steps, STEPS)
        with Table(folder / "columns", STEPS) as table:
            table.put_columns(StepBatch.of(recorder.steps).columns())
        assert pq.read_table(folder / "columns").equals(pq.read_table(folder / "rows"))
    if recorder.requests:
        write(folder / "rows", recorder.requests, REQUESTS)
        with Table(folder / "columns", REQUESTS) as table:
            table.put_columns(RequestBatch(recorder.requests).columns())
        same, whole = pq.read_table(folder / "columns"), pq.read_table(folder / "rows")
        by_token = ["token_times_ns", "output", "logprobs"]
        assert not any(map(len, same["token_times_ns"].to_pylist()))
        assert same.drop_columns(by_token).equals(whole.drop_columns(by_token))


@given(recorder=runs())
def test_spans_and_tables_made_by_column_are_those_made_row_by_row(recorder: Recorder, folder: Path) -> None:
    check(recorder, folder)


def test_so_are_those_of_several_replicas_and_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "BATCH", 7)
    recorder, other = rich(), play(random.Random(6), 30, 400, replica=3)
    recorder.steps = [step for pair in zip(recorder.steps, other.steps, strict=False) for step in pair]
    assert {step.replica for step in recorder.steps[:7]} == {0, 3}
    check(recorder, folder)


def test_and_those_of_steps_where_every_value_is_the_same(folder: Path) -> None:
    recorder = rich()
    step = recorder.steps[-1]
    longer = RankTiming(1, 0, 1, 0, step.timing.execute_ns + 9, 7)  # than the step: clocks may disagree
    recorder.steps[-1] = dataclasses.replace(step, ranks=(RankTiming(0), longer))
    for pick in (40, 2, 1):
        recorder.steps = recorder.steps[-pick:]
        recorder.requests = recorder.requests[-pick:]
        check(recorder, folder)


def test_a_column_of_span_ids_is_that_of_single_ones() -> None:
    traces = [request_trace("w", name) for name in ("a", "b", "ü")]
    ordinals = [0, 7, (3 << 40) + 1]
    halves = np.array([int(trace[:16], 16) for trace in traces], np.uint64)
    found = span_ids(halves, "step.plan", np.array(ordinals))
    assert [f"{number:016x}" for number in found.tolist()] == [
        span_id(trace, "step.plan", ordinal) for trace, ordinal in zip(traces, ordinals, strict=True)
    ]
    many = {span_id(traces[0], name, n) for name in ("step", "step.plan", "kv.release") for n in range(1000)}
    assert len(many) == 3000


def test_sums_over_steps_are_those_of_step_by_step_also_beyond_64_bits() -> None:
    recorder, other = rich(), play(random.Random(6), 30, 400, replica=1)
    steps = [step for pair in zip(recorder.steps, other.steps, strict=False) for step in pair]
    days = StepTiming(1, 2, 1 << 50, 4, 5)
    steps += [
        dataclasses.replace(
            step, timing=days, blocks_held=1 << 22, plan=dataclasses.replace(step.plan, index=n)
        )
        for n, step in enumerate(steps[:3])
    ]
    plain: dict[int, StepTotals] = {}
    for step in steps:
        total = plain.setdefault(step.replica, StepTotals())
        blocks = step.blocks_free + step.blocks_cached + step.blocks_held
        total.step(step.start, step.timing.total_ns, blocks, step.blocks_held, step.plan.digest)
        total.decided(step.plan, step.evicted)
    found: dict[int, StepTotals] = {}
    for first in range(0, len(steps), 50):
        StepBatch.of(steps[first : first + 50]).add_to(
            lambda replica: found.setdefault(replica, StepTotals())
        )
    assert found == plain


def test_numbers_and_words_that_json_writes_in_its_own_way(folder: Path) -> None:
    recorder = rich()

    def odd(request: Request, n: int) -> Request:
        draws = SamplingParams(temperature=[0.0, 1e-7, 3.0][n % 3], top_p=[1.0, 0.1][n % 2], seed=1 << 70)
        return dataclasses.replace(request, sampling=draws, tenant='a "b"\n', session=["", "\\"][n % 2])

    recorder.requests = [
        dataclasses.replace(record, request=odd(record.request, n), reason="\t é")
        for n, record in enumerate(recorder.requests)
    ]
    info = info_for(recorder)
    export.write_spans_of(folder / "columns", recorder, info)
    written = pq.read_table(folder / "columns")["attributes"].to_pylist()
    assert written == [
        json.dumps(row.attributes, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
        for row in spans(recorder, info)
    ]
    assert [name for name, _, _ in SPANS] == pq.read_schema(folder / "columns").names


@settings(deadline=None)  # scipy is imported where lengths were foreseen
@given(recorder=runs())
def test_metrics_of_requests_by_column_are_those_one_by_one(recorder: Recorder) -> None:
    one, other = Tally(16, fold=True), Tally(16, fold=True)
    for first in range(0, len(recorder.requests), 3):
        one.add(recorder.requests[first : first + 3])
        other.add_batch(RequestBatch(recorder.requests[first : first + 3]))
    assert other.result({}, recorder.fleet, None) == one.result({}, recorder.fleet, None)
