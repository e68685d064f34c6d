"""Spans in OpenTelemetry's own terms: SDK spans through any exporter, or an OTLP file. Observation path.

The SDK's tracer isn't used: it would stamp, sample, cap links at 128 and drop what its queue can't hold. Rows
become `ReadableSpan`s with their own times and ids instead, which any standard `SpanExporter` takes.

The file is the "OpenTelemetry Protocol File Exporter" format: JSON lines, one TracesData each; ids in hex,
enums as numbers, 64-bit integers as strings (protobuf's own JSON mapping does the first two otherwise).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lab.errors import ConfigError, RunError
from lab.observe.boundaries import SCHEMA_VERSION, Value
from lab.observe.identity import RunInfo
from lab.observe.spans import SpanRow

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

SCOPE = "lab.observe"
BATCH = 512
"""Spans in one export call, and in one line of a file."""

_T = TypeVar("_T")
_OTLP_KIND = {"INTERNAL": 1, "SERVER": 2}
_REMOTE_KNOWN = 0x100
"""SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK: the parent is known, and isn't remote."""


def resource(info: RunInfo) -> Resource:
    """The run as an OpenTelemetry resource: these attributes and no detected ones."""
    from opentelemetry.sdk.resources import Resource

    return Resource(info.attributes())


def readable(rows: Iterable[SpanRow], info: RunInfo) -> Iterator[ReadableSpan]:
    """Rows as SDK spans, one for one, with explicit times, ids and every link."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

    about, scope = resource(info), InstrumentationScope(SCOPE, str(SCHEMA_VERSION))
    sampled = TraceFlags(TraceFlags.SAMPLED)
    kinds = {"INTERNAL": SpanKind.INTERNAL, "SERVER": SpanKind.SERVER}
    unset = Status(StatusCode.UNSET)

    def context(trace_id: str, span_id: str) -> SpanContext:
        return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=sampled)

    for row in rows:
        error = row.attributes.get("error.type")
        yield ReadableSpan(
            name=row.name,
            context=context(row.trace_id, row.span_id),
            parent=context(row.trace_id, row.parent_span_id) if row.parent_span_id else None,
            resource=about,
            attributes=dict(row.attributes),
            links=[Link(context(link.trace_id, link.span_id), dict(link.attributes)) for link in row.links],
            kind=kinds[row.kind],
            status=Status(StatusCode.ERROR, str(error)) if error else unset,
            start_time=row.start_time_unix_nano,
            end_time=row.end_time_unix_nano,
            instrumentation_scope=scope,
        )


def export(rows: Iterable[SpanRow], info: RunInfo, exporter: SpanExporter) -> int:
    """Send every row through an SDK exporter and shut it down; returns how many went.

    Raises `RunError` when the exporter refuses a batch: nothing is dropped in silence.
    """
    from opentelemetry.sdk.trace.export import SpanExportResult

    sent = 0
    try:
        for batch in _batches(readable(rows, info), BATCH):
            if exporter.export(batch) is not SpanExportResult.SUCCESS:
                name = type(exporter).__name__
                raise RunError(f"{name} refused {len(batch)} spans, after {sent} that were exported")
            sent += len(batch)
    finally:
        exporter.shutdown()
    return sent


def export_to(target: str, rows: Iterable[SpanRow], info: RunInfo) -> int:
    """Export to `console`, to an OTLP/HTTP endpoint (`http://host:4318`), or to a file; returns the count.

    An endpoint without a path gets OTLP's `/v1/traces`. Raises `RunError` when not everything arrived.
    """
    if target == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return export(rows, info, ConsoleSpanExporter(out=sys.stdout))
    if target.startswith(("http://", "https://")):
        try:
            return export(rows, info, _http_exporter(target))
        except RunError as error:
            raise RunError(
                f"not all spans reached '{target}' (is a collector listening?): {error}"
            ) from error
    try:
        return write_otlp(Path(target), rows, info)
    except OSError as error:
        raise RunError(f"can't write spans to '{target}': {error.strerror or error}") from error


def _http_exporter(endpoint: str) -> SpanExporter:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        wanted = "opentelemetry-exporter-otlp-proto-http"
        raise ConfigError(f"exporting to '{endpoint}' needs a package: pip install {wanted}") from None
    path = endpoint.split("://", 1)[1].partition("/")[2]
    return OTLPSpanExporter(endpoint=endpoint if path else endpoint.rstrip("/") + "/v1/traces")


def write_otlp(path: Path, rows: Iterable[SpanRow], info: RunInfo) -> int:
    """Write spans as an OTLP file (`.jsonl`); returns how many. OS errors pass through."""
    about = {"attributes": _attributes(info.attributes())}
    scope = {"name": SCOPE, "version": str(SCHEMA_VERSION)}
    encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for batch in _batches(rows, BATCH):
            inner = {"scope": scope, "spans": [_span(row) for row in batch]}
            file.write(encode({"resourceSpans": [{"resource": about, "scopeSpans": [inner]}]}) + "\n")
            written += len(batch)
    return written


def _span(row: SpanRow) -> dict[str, Any]:
    span: dict[str, Any] = {"traceId": row.trace_id, "spanId": row.span_id}
    if row.parent_span_id:
        span["parentSpanId"] = row.parent_span_id
    span["flags"] = _REMOTE_KNOWN
    span["name"] = row.name
    span["kind"] = _OTLP_KIND[row.kind]
    span["startTimeUnixNano"] = str(row.start_time_unix_nano)
    span["endTimeUnixNano"] = str(row.end_time_unix_nano)
    if row.attributes:
        span["attributes"] = _attributes(row.attributes)
    if row.links:
        span["links"] = [
            {
                "traceId": link.trace_id,
                "spanId": link.span_id,
                "attributes": _attributes(link.attributes),
                "flags": _REMOTE_KNOWN,
            }
            for link in row.links
        ]
    error = row.attributes.get("error.type")
    span["status"] = {"code": 2, "message": error} if error else {}
    return span


def _attributes(attributes: Mapping[str, Value]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: Value) -> dict[str, Any]:
    if isinstance(value, bool):  # before int, whose subclass it is
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, str):
        return {"stringValue": value}
    return {"arrayValue": {"values": [{"stringValue": item} for item in value]}}


def _batches(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
