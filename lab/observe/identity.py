"""Who a run, a trace and a span are. Observation path.

Ids are content-addressed: a request of the same workload has the same trace id, and its spans the same span
ids, on the simulator and on the real engine. So two runs join on id, logs join with spans, and `lab.backend`
in the resource tells the sides apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal

from lab.control.request import GREEDY, Piece, Request, SamplingParams, Segment
from lab.observe.boundaries import SCHEMA_VERSION

SERVICE = "diptych"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What is true of every span of a run: the OpenTelemetry resource.

    `run` names this run and nothing else does; everything else is equal when the same thing is run again.
    """

    backend: Literal["sim", "real"]
    clock: Literal["stepped", "virtual", "wall"]
    evidence: Literal["measured", "modelled", "replayed"]
    workload: str
    """`workload_id` of the requests."""
    model: str
    policy: str
    seed: int
    run: str
    version: str = ""
    revision: str = ""

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> RunInfo:
        """What `attributes` were made of. Raises `KeyError` for the first that is missing."""
        return cls(
            backend=attributes["lab.backend"],
            clock=attributes["lab.clock"],
            evidence=attributes["lab.evidence"],
            workload=attributes["lab.workload.id"],
            model=attributes["gen_ai.request.model"],
            policy=attributes["lab.policy"],
            seed=attributes["lab.seed"],
            run=attributes["service.instance.id"],
            version=attributes.get("service.version", ""),
            revision=attributes.get("vcs.ref.head.revision", ""),
        )

    def attributes(self) -> dict[str, str | int]:
        """Resource attributes. `service.instance.id` is set because the SDK would make up a random one."""
        named: dict[str, str | int] = {
            "service.name": SERVICE,
            "service.instance.id": self.run,
            "service.version": self.version,
            "vcs.ref.head.revision": self.revision,
            "gen_ai.request.model": self.model,
            "lab.schema.version": SCHEMA_VERSION,
            "lab.backend": self.backend,
            "lab.clock": self.clock,
            "lab.evidence": self.evidence,
            "lab.workload.id": self.workload,
            "lab.policy": self.policy,
            "lab.seed": self.seed,
        }
        return {name: value for name, value in named.items() if value != ""}


def _hash(size: int, *parts: object) -> str:
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=size).hexdigest()


def workload_id(requests: Iterable[Request]) -> str:
    """32 hex digits that name a workload by its content, in whatever order the requests come."""
    h = hashlib.blake2b(digest_size=16)
    for request in sorted(requests, key=lambda request: (request.arrival, request.id)):
        pieces = ",".join([_piece(piece) for piece in request.prompt.pieces])
        h.update(f"{_PLAIN(request)}{pieces};{_sampling(request.sampling)}\n".encode())
    return h.hexdigest()


_PLAIN = attrgetter(*(item.name for item in fields(Request) if item.name not in ("prompt", "sampling")))


def _piece(piece: Piece) -> str:
    return f"{piece.stream}+{piece.start}:{piece.length}" if isinstance(piece, Segment) else repr(piece)


def _sampling(sampling: SamplingParams) -> str:
    return "" if sampling is GREEDY else repr(sampling)


def request_trace(workload: str, request: str) -> str:
    """Trace id of a request: 32 hex digits."""
    return _hash(16, workload, "request", request)


def request_traces(workload: str, requests: Iterable[str]) -> bytes:
    """`request_trace` of many, as numbers: 16 bytes each."""
    begun = hashlib.blake2b(f"{workload}\x1frequest\x1f".encode(), digest_size=16)
    digests = []
    for request in requests:
        h = begun.copy()
        h.update(request.encode())
        digests.append(h.digest())
    return b"".join(digests)


def replica_trace(workload: str, replica: int) -> str:
    """Trace id of a replica's steps: 32 hex digits."""
    return _hash(16, workload, "replica", replica)


def gateway_trace(workload: str) -> str:
    """Trace id of what the gateway does of its own accord: 32 hex digits."""
    return _hash(16, workload, "gateway")


_MASK = (1 << 64) - 1
_STRIDE, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@lru_cache(maxsize=256)
def name_salt(name: str) -> int:
    """What tells spans of one name from those of another in the same trace: 64 bits."""
    return int(_hash(8, name), 16)


def span_id(trace: str, name: str, ordinal: int) -> str:
    """Span id, 16 hex digits: the `ordinal`-th span called `name` in its trace.

    The `ordinal`-th number of a splitmix64 sequence whose beginning is the trace's first half and the name's salt:
    spans of one name in a trace can't share an id, and a column of ordinals becomes one of ids (`span_ids`).
    """
    z = ((int(trace[:16], 16) ^ name_salt(name)) + ordinal * _STRIDE) & _MASK
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return f"{z ^ (z >> 31):016x}"


def span_ids(traces: Any, name: str, ordinals: Any) -> Any:
    """The same for numpy columns: `traces` are the first halves of trace ids, as uint64; `ordinals` whole numbers."""
    import numpy as np

    steps = np.asarray(ordinals).astype(np.uint64) * np.uint64(_STRIDE)
    z = (traces ^ np.uint64(name_salt(name))) + steps
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
    return z ^ (z >> np.uint64(31))
