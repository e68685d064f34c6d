"""A workload: requests in arrival order, and where they came from. Request path."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lab.control.request import Request
from lab.errors import ConfigError

_LATEST_NS = 100 * 365 * 86_400 * 10**9  # keeps arrivals, and the run after them, inside 63 bits


@dataclass(frozen=True, slots=True)
class LengthStats:
    """Mean, linear-interpolated percentiles and extremes of token counts."""

    mean: float
    p50: float
    p99: float
    min: int
    max: int


@dataclass(frozen=True, slots=True)
class WorkloadStats:
    """What a workload looks like. `rate` is n / span (requests/s), None when everything arrives at once.

    `iat_cv` is the coefficient of variation (population) of the inter-arrival times; Poisson gives 1.
    It is None where it has no meaning: fewer than two gaps, or no gap above zero.
    """

    n: int
    span_s: float
    rate: float | None
    iat_cv: float | None
    input: LengthStats
    output: LengthStats


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in arrival order, file order kept on equal arrivals; `source` is JSON-able provenance."""

    name: str
    requests: tuple[Request, ...]
    source: dict[str, object]

    def __post_init__(self) -> None:
        if not self.requests:
            raise ValueError(f"workload '{self.name}' has no requests; expected at least 1")
        before = 0
        seen: set[str] = set()
        for request in self.requests:
            if request.arrival < before:
                raise ValueError(f"workload '{self.name}' isn't in arrival order at request '{request.id}'")
            if request.id in seen:
                raise ValueError(f"workload '{self.name}' has two requests called '{request.id}'")
            before = request.arrival
            seen.add(request.id)

    def __len__(self) -> int:
        return len(self.requests)

    def limit(self, n: int) -> Workload:
        """The first `n` requests by arrival."""
        if n < 1:
            raise ConfigError(f"trace.limit is {n}; expected an integer >= 1")
        return Workload(self.name, self.requests[:n], {**self.source, "limit": n})

    def rescale(self, rate_scale: float) -> Workload:
        """The same workload offered `rate_scale` times as fast.

        Arrivals are divided by `rate_scale`, except inside a session: what lies between two turns is a
        reply and a person thinking, and neither gets faster because more people came. So a session's
        first arrival is divided, and its later turns keep their distance to it.
        """
        if not (math.isfinite(rate_scale) and rate_scale > 0):
            raise ConfigError(f"trace.rate_scale is {rate_scale}; expected a number > 0")
        if rate_scale == 1:
            return self
        told = ((request.id, request.session, request.arrival) for request in self.requests)
        moved = [
            dataclasses.replace(request, arrival=arrival)
            for request, arrival in zip(self.requests, rescaled(told, rate_scale), strict=True)
        ]
        moved.sort(key=lambda request: request.arrival)  # stable: ties keep their order
        total = rate_scale * float(str(self.source.get("rate_scale", 1.0)))
        return Workload(self.name, tuple(moved), {**self.source, "rate_scale": total})

    def stats(self) -> WorkloadStats:
        """Counts, span, rate, burstiness and lengths (see `WorkloadStats`)."""
        import numpy as np

        arrivals = np.array([request.arrival for request in self.requests], dtype=np.int64)
        gaps = np.diff(arrivals).astype(np.float64)
        span_s = int(arrivals[-1] - arrivals[0]) / 1e9
        return WorkloadStats(
            n=len(self.requests),
            span_s=span_s,
            rate=len(self.requests) / span_s if span_s else None,
            iat_cv=float(gaps.std() / gaps.mean()) if len(gaps) > 1 and span_s else None,
            input=_lengths([len(request.prompt) for request in self.requests]),
            output=_lengths([request.output_limit for request in self.requests]),
        )


def rescaled(told: Iterable[tuple[str, str, int]], rate_scale: float) -> Iterator[int]:
    """Arrivals as `Workload.rescale` moves them: of each request its id, its session ("": none) and its arrival now."""
    starts: dict[str, int] = {}
    for name, session, arrival in told:
        start = starts.setdefault(session, arrival) if session else arrival
        scaled = start / rate_scale
        if scaled > _LATEST_NS:
            raise ConfigError(
                f"trace.rate_scale is {rate_scale}; it puts request '{name}' more than a century "
                "from the start; expected a larger number"
            )
        yield round(scaled) + arrival - start


def _lengths(values: Sequence[int]) -> LengthStats:
    import numpy as np

    p50, p99 = np.percentile(values, [50, 99])
    return LengthStats(sum(values) / len(values), float(p50), float(p99), min(values), max(values))
