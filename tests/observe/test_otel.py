"""Spans reach OpenTelemetry's tools exactly as they are; the official encoder and a real receiver say so."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SpanExporter, SpanExportResult

from lab.control.plan import StepPlan, Work
from lab.errors import RunError
from lab.observe.otel import export, export_to, readable, resource
from lab.observe.otlp import write_otlp
from lab.observe.plain import plain_spans
from lab.observe.recorder import Recorder
from lab.observe.spans import SpanRow, spans
from tests.observe.made import info_for, rich, runs


def base64_ids(value: Any) -> Any:
    """OTLP/JSON's hex ids as protobuf's own JSON parser wants them."""
    if isinstance(value, list):
        return [base64_ids(item) for item in value]
    if isinstance(value, dict):
        ids = ("traceId", "spanId", "parentSpanId")
        return {
            key: base64.b64encode(bytes.fromhex(item)).decode() if key in ids else base64_ids(item)
            for key, item in value.items()
        }
    return value


def spans_in_file(path: Path) -> TracesData:
    whole = TracesData()
    for line in path.read_text(encoding="utf-8").splitlines():
        whole.MergeFrom(json_format.ParseDict(base64_ids(json.loads(line)), TracesData()))
    return whole


def flat(data: TracesData | ExportTraceServiceRequest) -> list[Any]:
    return [span for group in data.resource_spans for scope in group.scope_spans for span in scope.spans]


@given(recorder=runs())
def test_the_otlp_file_says_what_the_official_encoder_says(
    recorder: Recorder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    info = info_for(recorder)
    path = tmp_path_factory.mktemp("otlp") / "spans.jsonl"
    rows = list(spans(recorder, info))
    assert write_otlp(path, plain_spans(recorder, info), info) == len(rows)
    official = encode_spans(list(readable(rows, info)))
    written = spans_in_file(path)
    assert flat(written) == flat(official)
    for group in written.resource_spans:
        assert group.resource == official.resource_spans[0].resource
        assert group.scope_spans[0].scope == official.resource_spans[0].scope_spans[0].scope


def test_a_line_of_the_file_is_otlp_json_with_hex_ids_and_numbers_for_enums(tmp_path: Path) -> None:
    recorder = rich()
    info = info_for(recorder)
    write_otlp(tmp_path / "s.jsonl", plain_spans(recorder, info), info)
    first = json.loads((tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines()[0])
    span = first["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    row = next(spans(recorder, info))
    assert (span["traceId"], span["spanId"], span["kind"]) == (row.trace_id, row.span_id, 2)
    assert span["startTimeUnixNano"] == str(row.start_time_unix_nano)


def test_the_resource_says_whose_spans_these_are_and_nothing_random() -> None:
    recorder = rich()
    sim, real = (resource(info_for(recorder, backend=backend)).attributes for backend in ("sim", "real"))
    assert {key for key in sim if sim[key] != real[key]} == {"lab.backend"}
    assert sim["service.instance.id"] == "run-a"
    for key in (
        "service.name",
        "lab.clock",
        "lab.evidence",
        "lab.schema.version",
        "lab.seed",
        "lab.workload.id",
    ):
        assert key in sim


def test_a_step_of_a_thousand_requests_keeps_a_thousand_links() -> None:
    recorder = rich()
    step = recorder.steps[0]
    names = [record.request.id for record in recorder.requests]
    work = tuple(Work(names[n % len(names)], n, 1, False) for n in range(1000))
    plan = dataclasses.replace(step.plan, work=work)
    assert isinstance(plan, StepPlan)
    recorder.steps[:] = [dataclasses.replace(step, plan=plan)]
    info = info_for(recorder)
    sent = encode_spans(list(readable(spans(recorder, info), info)))
    [root] = [span for span in flat(sent) if span.name == "step"]
    assert len(root.links) == 1000
    assert root.dropped_links_count == 0


def test_the_console_exporter_prints_every_span() -> None:
    recorder = rich()
    info = info_for(recorder)
    rows = list(spans(recorder, info))
    out = io.StringIO()
    assert export(
        rows, info, ConsoleSpanExporter(out=out, formatter=lambda span: span.to_json(None) + "\n")
    ) == len(rows)
    printed = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [span["name"] for span in printed] == [row.name for row in rows]


def test_requests_that_did_not_finish_are_errors_and_the_others_are_not() -> None:
    recorder = rich()
    info = info_for(recorder)
    outcomes = {record.request.id: record.outcome for record in recorder.requests}
    for span in readable(spans(recorder, info), info):
        name = str((span.attributes or {}).get("lab.request.id"))
        assert span.status.is_ok == (outcomes.get(name, "finished") == "finished")


def test_an_exporter_that_fails_midway_is_shut_down_and_told_of() -> None:
    class Full(SpanExporter):
        seen, closed = 0, False

        def export(self, spans: Any) -> SpanExportResult:
            self.seen += 1
            return SpanExportResult.SUCCESS if self.seen == 1 else SpanExportResult.FAILURE

        def shutdown(self) -> None:
            self.closed = True

    recorder = rich()
    info = info_for(recorder)
    rows: list[SpanRow] = list(spans(recorder, info)) * 3
    exporter = Full()
    with pytest.raises(RunError, match="after 512 that were exported"):
        export(rows, info, exporter)
    assert exporter.closed


def test_a_full_disk_is_one_sentence() -> None:
    recorder = rich()
    info = info_for(recorder)
    with pytest.raises(RunError, match="'/dev/full': No space left"):
        export_to("/dev/full", recorder, info)
