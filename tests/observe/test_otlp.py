"""Hand-packed OTLP is what the official encoder says, and reaches real HTTP and gRPC servers whole."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from lab.control.plan import Work
from lab.errors import ConfigError, RunError
from lab.observe import send as sending
from lab.observe.export import write_spans
from lab.observe.identity import RunInfo
from lab.observe.otel import export_to, readable
from lab.observe.otlp import messages
from lab.observe.plain import plain_spans, plain_spans_of_table
from lab.observe.protobuf import integer, varint
from lab.observe.recorder import Recorder
from lab.observe.send import check_endpoint, headers, send
from lab.observe.spans import spans
from tests.observe.made import info_for, rich, runs


def parsed(recorder: Recorder, info: RunInfo, **limits: int) -> list[ExportTraceServiceRequest]:
    found = []
    for message, count in messages(plain_spans(recorder, info), info, **limits):
        found.append(ExportTraceServiceRequest.FromString(message))
        assert count == len(found[-1].resource_spans[0].scope_spans[0].spans)
    return found


@given(recorder=runs())
def test_messages_parse_to_what_the_official_encoder_says(recorder: Recorder) -> None:
    info = info_for(recorder)
    rows = list(spans(recorder, info))
    [*ours] = parsed(recorder, info)
    if not rows:
        assert not ours
        return
    [message] = ours
    assert message == encode_spans(list(readable(rows, info)))


def test_attributes_of_every_type_and_size_survive() -> None:
    """Lengths that need several bytes, numbers of ten bytes, text that isn't ASCII."""
    recorder = rich()
    record = recorder.requests[0]
    request = dataclasses.replace(
        record.request, session="ß" * 5000, priority=-3, ttft_slo=2**62, tenant='"\\\n', id="größe" * 40
    )
    recorder.requests[:] = [
        dataclasses.replace(record, request=request, reason="x" * 130, computed_tokens=2**40)
    ]
    recorder.steps.clear()
    info = info_for(recorder)
    [message] = parsed(recorder, info)
    assert message == encode_spans(list(readable(spans(recorder, info), info)))


@given(recorder=runs())
def test_messages_are_bounded_in_bytes_and_in_spans(recorder: Recorder) -> None:
    info = info_for(recorder)
    [*whole] = parsed(recorder, info)
    flat = [s for m in whole for s in m.resource_spans[0].scope_spans[0].spans]
    for limits in ({"most_bytes": 5_000}, {"most_spans": 3}):
        parts = parsed(recorder, info, **limits)
        assert [s for m in parts for s in m.resource_spans[0].scope_spans[0].spans] == flat
        for part in parts:
            count = len(part.resource_spans[0].scope_spans[0].spans)
            assert part.resource_spans[0].resource == whole[0].resource_spans[0].resource
            assert count <= limits.get("most_spans", count)
            assert part.ByteSize() <= limits.get("most_bytes", part.ByteSize()) or count == 1


def test_varints_at_their_edges() -> None:
    for value in (0, 1, 127, 128, 16383, 16384, 2**31, 2**63 - 1):
        whole, shift = 0, 0
        for byte in varint(value):
            whole |= (byte & 0x7F) << shift
            shift += 7
        assert whole == value
        assert varint(value)[-1] < 0x80
    assert len(integer(-1)) == 10


def test_spans_of_a_table_are_those_of_the_records_without_links(tmp_path: Path) -> None:
    recorder = rich()
    info = info_for(recorder)
    write_spans(tmp_path / "spans.parquet", spans(recorder, info, links=False))
    assert list(plain_spans_of_table(tmp_path / "spans.parquet")) == list(
        plain_spans(recorder, info, links=False)
    )
    (tmp_path / "spans.parquet").write_text("no")
    with pytest.raises(RunError, match="as a table of spans"):
        list(plain_spans_of_table(tmp_path / "spans.parquet"))


# -- servers ---------------------------------------------------------------------------------------------


class Collector:
    """What a collector got, and what it is to answer: one of `script` for each call, then yes."""

    def __init__(self) -> None:
        self.got: list[ExportTraceServiceRequest] = []
        self.sizes: list[int] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.script: list[Any] = []
        self.answer = ExportTraceServiceResponse()


class _Handler(BaseHTTPRequestHandler):
    server: HttpServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        to = self.server.collector
        code = to.script.pop(0) if to.script else 200
        if code == 200:
            assert self.headers["Content-Type"] == "application/x-protobuf"
            to.got.append(ExportTraceServiceRequest.FromString(body))
            to.sizes.append(len(body))
        to.paths.append(self.path)
        to.headers.append({key.lower(): value for key, value in self.headers.items()})
        self.send_response(code)
        if code == 429:
            self.send_header("Retry-After", "7")
        self.end_headers()
        self.wfile.write(to.answer.SerializeToString() if code == 200 else b"because of\nthis")

    def log_message(self, *args: Any) -> None:
        """Quiet."""


class HttpServer(HTTPServer):
    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        super().__init__(("127.0.0.1", 0), _Handler)


class Servicer(TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self.collector = collector

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802  # the service's own name for it
        to = self.collector
        to.headers.append({key: str(value) for key, value in context.invocation_metadata()})
        if to.script:
            context.abort(to.script.pop(0), "because of\nthis")
        to.got.append(request)
        to.sizes.append(request.ByteSize())
        return to.answer


@pytest.fixture(params=["http", "grpc"])
def listening(request: pytest.FixtureRequest) -> Iterator[tuple[str, Collector]]:
    collector = Collector()
    if request.param == "grpc":
        service = grpc.server(futures.ThreadPoolExecutor(1))
        add_TraceServiceServicer_to_server(Servicer(collector), service)
        port = service.add_insecure_port("127.0.0.1:0")
        service.start()
        yield f"grpc://127.0.0.1:{port}", collector
        service.stop(None).wait()
        return
    with HttpServer(collector) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", collector
        server.shutdown()
        thread.join()


def test_a_collector_gets_a_trace_for_each_request_with_links_from_its_steps(
    listening: tuple[str, Collector],
) -> None:
    endpoint, collector = listening
    recorder = rich()
    info = info_for(recorder)
    rows = list(spans(recorder, info))
    assert export_to(endpoint, recorder, info, {"x-key": "secret"}) == len(rows)
    assert collector.headers[0]["x-key"] == "secret"
    assert set(collector.paths) <= {"/v1/traces"}
    got = [span for body in collector.got for span in body.resource_spans[0].scope_spans[0].spans]
    assert [
        (
            s.trace_id.hex(),
            s.span_id.hex(),
            s.parent_span_id.hex(),
            s.name,
            s.start_time_unix_nano,
            s.end_time_unix_nano,
        )
        for s in got
    ] == [
        (r.trace_id, r.span_id, r.parent_span_id or "", r.name, r.start_time_unix_nano, r.end_time_unix_nano)
        for r in rows
    ]
    roots = {span.span_id: span for span in got if span.name == "request"}
    assert len(roots) == len(recorder.requests) == len({span.trace_id for span in roots.values()})
    by_step = {step.plan.index: step.plan for step in recorder.steps}
    for span in got:
        if span.name != "step":
            assert not span.links
            continue
        said = {pair.key: pair.value for pair in span.attributes}
        work = by_step[said["lab.step.index"].int_value].work
        assert len(span.links) == len(work)
        for link, item in zip(span.links, work, strict=True):
            about = {pair.key: pair.value for pair in roots[link.span_id].attributes}
            assert about["lab.request.id"].string_value == item.request
            assert roots[link.span_id].trace_id == link.trace_id
    for body in collector.got:
        about = {pair.key: pair.value for pair in body.resource_spans[0].resource.attributes}
        assert about["service.name"].string_value == "diptych"
        assert about["lab.backend"].string_value == "sim"
        assert about["lab.seed"].int_value == 7


def test_a_large_run_goes_in_messages_that_a_server_takes_by_default(
    listening: tuple[str, Collector],
) -> None:
    endpoint, collector = listening
    recorder = rich()
    names = [record.request.id for record in recorder.requests]
    work = tuple(Work(names[n % len(names)], n, 1 + n % 3, False) for n in range(2500))
    recorder.steps[:] = [
        dataclasses.replace(step, plan=dataclasses.replace(step.plan, work=work))
        for step in recorder.steps[:40]
    ]
    info = info_for(recorder)
    expected = sum(1 for _ in spans(recorder, info))
    assert export_to(endpoint, recorder, info) == expected  # more than 4 MB in all
    assert sum(collector.sizes) > 4 << 20
    assert max(collector.sizes) < 4 << 20


def test_failures_that_may_pass_are_tried_again(listening: tuple[str, Collector]) -> None:
    endpoint, collector = listening
    unavailable = grpc.StatusCode.UNAVAILABLE if endpoint.startswith("grpc") else 503
    collector.script = [unavailable, unavailable]
    recorder, waits = rich(), []  # type: ignore[var-annotated]
    info = info_for(recorder)
    rows = sum(1 for _ in spans(recorder, info))
    assert send(endpoint, plain_spans(recorder, info), info, pause=waits.append) == rows
    assert waits == [0.25, 0.5]
    collector.script = [unavailable] * 9
    with pytest.raises(RunError, match=r"because of this.*, 5 times; 0 had arrived before"):
        send(endpoint, plain_spans(recorder, info), info, pause=waits.append)
    assert len(collector.script) == 4
    if endpoint.startswith("http"):
        collector.script, waits[:] = [429], []
        send(endpoint, plain_spans(recorder, info), info, pause=waits.append)
        assert waits == [7.0]


def test_a_refusal_is_one_sentence_at_once(listening: tuple[str, Collector]) -> None:
    endpoint, collector = listening
    recorder = rich()
    info = info_for(recorder)
    collector.script = [grpc.StatusCode.UNAUTHENTICATED if endpoint.startswith("grpc") else 401]
    with pytest.raises(RunError) as caught:
        send(endpoint, plain_spans(recorder, info), info, pause=pytest.fail)
    said = str(caught.value)
    assert endpoint in said
    assert "401 Unauthorized (because of this)" in said or "UNAUTHENTICATED: because of this" in said
    assert "\n" not in said


def test_what_a_collector_rejects_is_an_error(listening: tuple[str, Collector]) -> None:
    endpoint, collector = listening
    collector.answer.partial_success.rejected_spans = 3
    collector.answer.partial_success.error_message = "too\nold"
    recorder = rich()
    info = info_for(recorder)
    with pytest.raises(RunError, match=r"rejected 3 of \d+ spans \(too old\)"):
        send(endpoint, plain_spans(recorder, info), info, pause=pytest.fail)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_nobody_listening_is_one_sentence(scheme: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can take the port meanwhile
        endpoint = f"{scheme}://127.0.0.1:{taken.getsockname()[1]}"
        recorder = rich()
        info = info_for(recorder)
        waits: list[float] = []
        with pytest.raises(RunError, match="is a collector listening") as caught:
            send(endpoint, plain_spans(recorder, info), info, pause=waits.append)
        assert waits == [0.25, 0.5, 1.0, 2.0]
        assert "refused" in str(caught.value)


def test_a_collector_that_never_answers_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        recorder = rich()
        info = info_for(recorder)
        with pytest.raises(RunError, match="no answer in time"):
            send(endpoint, plain_spans(recorder, info), info, timeout_s=0.02, pause=lambda _: None)


def test_addresses_and_headers() -> None:
    good = ("http://localhost:4318", "https://collector/v1/traces", "grpc://localhost:4317", "grpcs://x")
    assert [check_endpoint(address) for address in good] == [""] * 4
    for bad in (
        "localhost:4317",
        "ftp://x",
        "grpc://",
        "grpc://x:1/v1/traces",
        "http://x:99999",
        "http://a b",
    ):
        assert check_endpoint(bad)
    assert headers("") == {}
    assert headers("Api-Key=a%20b, x=1=2,") == {"api-key": "a b", "x": "1=2"}


def test_without_grpcio_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"pip install 'diptych\[otlp\]'"):
        sending.check_packages("grpc://localhost")
    sending.check_packages("http://localhost")
