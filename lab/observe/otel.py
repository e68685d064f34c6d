"""Spans in OpenTelemetry's own terms: SDK spans through any exporter. Observation path.

The SDK's tracer isn't used: it would stamp, sample, cap links at 128 and drop what its queue can't hold. Rows
become `ReadableSpan`s with their own times and ids instead, which any standard `SpanExporter` takes. OTLP itself, to
a file or an endpoint, needs no SDK: `lab.observe.otlp` packs it many times faster.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lab.errors import RunError
from lab.observe.boundaries import SCHEMA_VERSION
from lab.observe.identity import RunInfo
from lab.observe.otlp import SCOPE
from lab.observe.plain import PlainSpan, plain_spans
from lab.observe.recorder import Recorded
from lab.observe.spans import SpanRow, spans

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

BATCH = 512
"""Spans in one export call."""

_T = TypeVar("_T")


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


def export_to(
    target: str, recorded: Recorded, info: RunInfo, headers: Mapping[str, str] | None = None
) -> int:
    """Export to `console`, to an OTLP endpoint (`lab.observe.send`), or to an OTLP file; returns the count.

    Raises `RunError` when not everything arrived.
    """
    if target == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return export(spans(recorded, info), info, ConsoleSpanExporter(out=sys.stdout))
    return export_plain(target, plain_spans(recorded, info), info, headers)


def export_plain(
    target: str, plain: Iterable[PlainSpan], info: RunInfo, headers: Mapping[str, str] | None = None
) -> int:
    """The same for spans that are plain already; not to `console`."""
    if "://" in target:
        from lab.observe.send import send

        return send(target, plain, info, headers)
    from lab.observe.otlp import write_otlp

    try:
        return write_otlp(Path(target), plain, info)
    except OSError as error:
        raise RunError(f"can't write spans to '{target}': {error.strerror or error}") from error


def _batches(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
