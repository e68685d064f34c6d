"""Where one request's time went, from its record, in integer nanoseconds. Observation path.

TTFT plus the sum of its ITLs is its E2E exactly. What these are called elsewhere stands in `lab/observe/metrics.py`.
"""

from __future__ import annotations

from itertools import pairwise

from lab.control.observer import RequestRecord


def ttft_ns(record: RequestRecord) -> int:
    """Arrival to first token. Only for a request that has one."""
    return record.token_times[0] - record.request.arrival


def itls_ns(record: RequestRecord) -> list[int]:
    """Gaps between consecutive tokens: one fewer than tokens."""
    return [later - earlier for earlier, later in pairwise(record.token_times)]


def tpot_ns(record: RequestRecord) -> float | None:
    """Mean gap between tokens, or None with fewer than two."""
    times = record.token_times
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def e2e_ns(record: RequestRecord) -> int:
    """Arrival to end."""
    return record.end - record.request.arrival


def first_scheduled(record: RequestRecord) -> int | None:
    """When it first ran, or None if it never did."""
    return next((part.start for part in record.intervals if part.phase != "queue"), None)


def queue_ns(record: RequestRecord) -> int | None:
    """Scheduling delay: arrival to first schedule, or None if it never ran."""
    start = first_scheduled(record)
    return None if start is None else start - record.request.arrival


def phase_ns(record: RequestRecord, phase: str) -> int:
    """All time in one phase."""
    return sum(part.end - part.start for part in record.intervals if part.phase == phase)


def queue_total_ns(record: RequestRecord) -> int:
    """All time spent waiting."""
    return phase_ns(record, "queue")
