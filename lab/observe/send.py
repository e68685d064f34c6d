"""Sends spans to a collector: OTLP over HTTP or over gRPC. Observation path.

    http://host:4318, https://...    protobuf over HTTP; without a path, OTLP's own `/v1/traces`
    grpc://host:4317, grpcs://...    gRPC, plain or over TLS; needs the package grpcio

Messages are bounded (`otlp.MOST_BYTES`), each is tried several times where a failure may pass, and what a collector
says it rejected is an error: nothing is dropped in silence.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from lab.errors import ConfigError, RunError
from lab.observe.identity import RunInfo
from lab.observe.otlp import messages
from lab.observe.plain import PlainSpan

TIMEOUT_S = 10.0
"""For one message."""
TRIES = 5
PAUSE_S = 0.25
"""Before the second try; twice as long before each further one."""
MOST_PAUSE_S = 30.0
"""However long a collector asks for."""

SCHEMES = ("http", "https", "grpc", "grpcs")
NEEDS_GRPC = "needs the package grpcio: pip install 'diptych[otlp]'"
_PASSING_HTTP = (429, 502, 503, 504)
_PASSING_GRPC = ("CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS")
_METHOD = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"

Headers = Mapping[str, str]


class Refused(Exception):
    """A message didn't arrive. `passing`: another try may do; `after_s`: when the collector said to come back."""

    def __init__(self, reason: str, *, passing: bool, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.passing, self.after_s = passing, after_s


class Transport(Protocol):
    """One try to hand a message over: returns the collector's answer, an `ExportTraceServiceResponse`."""

    def send(self, message: bytes) -> bytes: ...
    def close(self) -> None: ...


def check_endpoint(endpoint: str) -> str:
    """What is wrong with an address, as the end of a sentence; "" when spans can be sent to it."""
    try:
        address = urlsplit(endpoint)
        _ = address.port
    except ValueError as error:
        return str(error)
    if address.scheme not in SCHEMES:
        return "it doesn't begin with http://, https://, grpc:// or grpcs://"
    if any(character.isspace() or not character.isprintable() for character in endpoint):
        return "it has a space in it"
    if not address.hostname:
        return "it names no host"
    if address.scheme.startswith("grpc") and address.path.strip("/"):
        return f"gRPC knows no path, and it has '{address.path}'"
    return ""


def check_packages(endpoint: str) -> None:
    """Raise `ConfigError` when a package that this address needs isn't there."""
    if endpoint.startswith("grpc") and importlib.util.find_spec("grpc") is None:
        raise ConfigError(f"exporting to '{endpoint}' {NEEDS_GRPC}")


def headers(said: str) -> dict[str, str]:
    """`OTEL_EXPORTER_OTLP_HEADERS` as OpenTelemetry defines it: `key=value,key=value`, percent-encoded."""
    pairs = (part.partition("=") for part in said.split(",") if part.strip())
    return {unquote(key.strip()).lower(): unquote(value.strip()) for key, _, value in pairs}


def send(
    endpoint: str,
    spans: Iterable[PlainSpan],
    info: RunInfo,
    more: Headers | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    pause: Callable[[float], object] = time.sleep,
) -> int:
    """Send every span; returns how many. Raises `RunError` when not everything arrived, in one sentence.

    `more` are further headers, such as a key.
    """
    check_packages(endpoint)
    transport: Transport = (_Grpc if endpoint.startswith("grpc") else _Http)(endpoint, timeout_s, more or {})
    sent = 0
    try:
        for message, count in messages(spans, info):
            _check(_deliver(transport, message, pause), count)
            sent += count
    except Refused as error:
        raise RunError(
            f"not all spans reached '{endpoint}' (is a collector listening?): {error}; {sent} had arrived before"
        ) from error
    finally:
        transport.close()
    return sent


def _deliver(transport: Transport, message: bytes, pause: Callable[[float], object]) -> bytes:
    wait = PAUSE_S
    for left in reversed(range(TRIES)):
        try:
            return transport.send(message)
        except Refused as error:
            if not error.passing:
                raise
            if not left:
                raise Refused(f"{error}, {TRIES} times", passing=False) from error
            pause(min(max(wait, error.after_s), MOST_PAUSE_S))
            wait *= 2
    raise AssertionError("the last try returns or raises")


def _check(answer: bytes, count: int) -> None:
    """Raise `Refused` when the collector took only a part."""
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    try:
        part = ExportTraceServiceResponse.FromString(answer).partial_success
    except DecodeError:
        return  # it said yes, in words of its own (JSON, or a proxy's)
    if part.rejected_spans:
        reason = " ".join(part.error_message.split()) or "no reason given"
        raise Refused(f"it rejected {part.rejected_spans} of {count} spans ({reason})", passing=False)


class _Http:
    def __init__(self, endpoint: str, timeout_s: float, more: Headers) -> None:
        path = urlsplit(endpoint).path.strip("/")
        self._url = endpoint if path else endpoint.rstrip("/") + "/v1/traces"
        self._timeout_s = timeout_s
        self._headers = {"content-type": "application/x-protobuf", "user-agent": "diptych"} | dict(more)

    def send(self, message: bytes) -> bytes:
        import http.client
        import urllib.error
        import urllib.request

        request = urllib.request.Request(self._url, data=message, headers=self._headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                body: bytes = answer.read()
                return body
        except urllib.error.HTTPError as error:
            with error:
                after = error.headers.get("Retry-After", "")
                why = _words(error.read(2000))
            raise Refused(
                f"HTTP {error.code} {error.reason}{why}",
                passing=error.code in _PASSING_HTTP,
                after_s=float(after) if after.isdecimal() else 0.0,
            ) from error
        except urllib.error.URLError as error:
            raise Refused(_reason(error.reason), passing=True) from error
        except (OSError, http.client.HTTPException) as error:
            raise Refused(_reason(error), passing=True) from error

    def close(self) -> None:
        """Each message has a connection of its own."""


class _Grpc:
    def __init__(self, endpoint: str, timeout_s: float, more: Headers) -> None:
        import grpc

        address = urlsplit(endpoint)
        where = address.netloc if address.port else f"{address.netloc}:4317"
        secure = address.scheme == "grpcs"
        self._channel = (
            grpc.secure_channel(where, grpc.ssl_channel_credentials())
            if secure
            else grpc.insecure_channel(where)
        )
        self._call: Any = self._channel.unary_unary(_METHOD)  # bytes go in and come out as they are
        self._timeout_s, self._metadata = timeout_s, tuple(more.items())

    def send(self, message: bytes) -> bytes:
        import grpc

        try:
            answer: bytes = self._call(message, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            code, said = error.code().name, " ".join((error.details() or "").split())
            raise Refused(f"gRPC {code}: {said}", passing=code in _PASSING_GRPC) from error
        return answer

    def close(self) -> None:
        self._channel.close()


def _words(body: bytes) -> str:
    """A body that is readable text, shortened: some collectors say why."""
    try:
        said = " ".join(body.decode().split())[:200]
    except UnicodeDecodeError:
        return ""
    return f" ({said})" if said and said.isprintable() else ""


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
