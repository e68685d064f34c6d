"""The tables lose nothing, and are the same bytes for the same content."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.control.request import Prompt, Request, SamplingParams, Segment
from lab.errors import RunError
from lab.observe import export
from lab.observe.export import read_workload, write_requests, write_spans, write_steps, write_workload
from lab.observe.recorder import Recorder, by_entry
from lab.observe.spans import spans
from tests.observe.made import info_for, make_request, rich, runs

i64 = st.integers(0, 2**63 - 1)
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
segments = st.builds(Segment, st.integers(0, 2**64 - 1), i64, st.integers(1, 2**40))
requests = st.builds(
    Request,
    id=st.text(st.characters(codec="utf-8")),
    prompt=st.lists(tokens | segments, min_size=1, max_size=4).map(lambda p: Prompt(tuple(p))).filter(len),
    arrival=i64,
    max_tokens=st.integers(1, 2**40),
    output_len=st.none() | st.integers(1, 2**40),
    stop_ids=tokens,
    sampling=st.builds(
        SamplingParams,
        temperature=st.floats(0, allow_infinity=False),
        top_k=st.integers(0, 2**40),
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1),
        seed=st.integers(-(2**63), 2**63 - 1),
        logprobs=st.none() | st.integers(0, 20),
        repetition_penalty=st.floats(0, exclude_min=True, allow_infinity=False),
        presence_penalty=st.floats(allow_infinity=False, allow_nan=False),
        frequency_penalty=st.floats(allow_infinity=False, allow_nan=False),
        logit_bias=st.lists(st.tuples(st.integers(0, 2**31), st.floats(-100, 100)), max_size=3).map(tuple),
        min_tokens=st.integers(0, 1),
    ),
    tenant=st.text(st.characters(codec="utf-8")),
    session=st.text(st.characters(codec="utf-8")),
    priority=st.integers(-(2**63), 2**63 - 1),
    ttft_slo=st.none() | i64,
    tpot_slo=st.none() | i64,
    cache_salt=st.text(st.characters(codec="utf-8")),
    n=st.integers(1, 9),
    parent=st.text(st.characters(codec="utf-8")),
    sample=st.integers(0, 9),
    stop=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=2).map(tuple),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@given(workload=st.lists(requests, max_size=5))
def test_a_workload_comes_back_equal_in_order_of_arrival(workload: list[Request], folder: Path) -> None:
    path = folder / "workload.parquet"
    assert write_workload(path, workload) == len(workload)
    assert read_workload(path) == sorted(workload, key=lambda request: request.arrival)


def test_a_field_added_to_requests_must_be_given_a_column() -> None:
    # The round trip above can't miss a field unless its strategy does: hold both to the dataclasses.
    columns = {name for name, _, _ in export.WORKLOAD}
    spelled = {"prompt": "pieces", "sampling": "seed", "seed": "sampling_seed"}
    for owner in (Request, SamplingParams):
        for field in dataclasses.fields(owner):
            name = spelled.get(field.name, field.name)
            assert name == "seed" or columns & {name, f"{name}_ns"}, (
                f"{owner.__name__}.{field.name} has no column"
            )


@given(recorder=runs())
def test_records_come_back_equal_from_their_tables(recorder: Recorder, folder: Path) -> None:
    workload = [record.request for record in recorder.requests]
    write_requests(folder / "r.parquet", recorder.requests)
    write_steps(folder / "s.parquet", recorder.steps)
    export.write_plans(folder / "p.parquet", recorder.steps)
    assert export.read_requests(folder / "r.parquet", workload) == by_entry(recorder.requests)
    plans = export.read_plans(folder / "p.parquet", workload)
    assert plans == [step.plan for step in recorder.steps]
    assert export.read_steps(folder / "s.parquet", plans) == recorder.steps


@given(recorder=runs())
def test_attributes_of_spans_are_json_with_sorted_keys(recorder: Recorder, folder: Path) -> None:
    rows = list(spans(recorder, info_for(recorder)))
    write_spans(folder / "x.parquet", rows)
    written = pq.read_table(folder / "x.parquet").column("attributes").to_pylist()
    plain = {"separators": (",", ":"), "sort_keys": True, "ensure_ascii": False}
    assert written == [json.dumps(row.attributes, **plain) for row in rows]


def test_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        recorder = rich()
        write_requests(tmp_path / f"{name}.requests", recorder.requests)
        write_steps(tmp_path / f"{name}.steps", recorder.steps)
        write_spans(tmp_path / f"{name}.spans", spans(recorder, info_for(recorder, run=name)))
    for table in ("requests", "steps", "spans"):
        assert (tmp_path / f"a.{table}").read_bytes() == (tmp_path / f"b.{table}").read_bytes()


def test_columns_have_their_declared_types_even_when_there_are_no_rows(tmp_path: Path) -> None:
    recorder = rich()
    tables = {
        "workload": (write_workload, [record.request for record in recorder.requests]),
        "requests": (write_requests, recorder.requests),
        "steps": (write_steps, recorder.steps),
        "plans": (export.write_plans, recorder.steps),
        "spans": (write_spans, list(spans(recorder, info_for(recorder)))),
    }
    for name, (write, rows) in tables.items():
        assert write(tmp_path / "full", rows) == len(rows)  # type: ignore[operator, arg-type]
        assert write(tmp_path / "empty", []) == 0  # type: ignore[operator]
        full, empty = (pq.read_schema(tmp_path / kind) for kind in ("full", "empty"))
        assert full.equals(empty, check_metadata=True), name
        assert full.metadata[b"lab.schema.version"] == b"1"


def test_many_rows_are_streamed_in_row_groups(tmp_path: Path) -> None:
    count = export.ROW_GROUP + 10
    pulled = []

    def rows() -> object:
        recorder = rich()
        row = next(spans(recorder, info_for(recorder)))
        for number in range(count):
            pulled.append(number)
            yield row

    assert write_spans(tmp_path / "spans.parquet", rows()) == count  # type: ignore[arg-type]
    assert len(pulled) == count
    assert [
        pq.ParquetFile(tmp_path / "spans.parquet").metadata.row_group(group).num_rows for group in range(2)
    ] == [export.ROW_GROUP, 10]


def test_a_value_that_fits_no_column_is_named(tmp_path: Path) -> None:
    request = dataclasses.replace(make_request(random.Random(1), 1), priority=2**70)
    with pytest.raises(RunError, match=r"column 'priority' of 'w\.parquet'"):
        write_workload(tmp_path / "w.parquet", [request])


def test_a_file_that_is_something_else_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "w.parquet").write_text("not parquet at all", encoding="utf-8")
    with pytest.raises(RunError, match=r"can't read '.*w\.parquet'"):
        read_workload(tmp_path / "w.parquet")
    write_steps(tmp_path / "w.parquet", [])
    with pytest.raises(RunError, match="has no column 'id'"):
        read_workload(tmp_path / "w.parquet")
