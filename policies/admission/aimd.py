"""aimd: a limit on requests in flight that creeps up while latency is good and drops when it isn't.

Rule: on each end: aborted, or slower than `timeout_ms`: limit * `backoff`, rounded down; else, if at least half of the
limit is in flight, limit + 1.
Origin: TCP's congestion control (Chiu and Jain 1989); AIMDLimit of Netflix's concurrency-limits.
Wins: finds the capacity without a model, and finds it again when it changes. Loses: needs a timeout; saw-tooth; learns
of overload one latency late. Cost: O(1).
"""

from __future__ import annotations

from policies.admission.common import ConcurrencyLimit, Latency


class Aimd(ConcurrencyLimit):
    """`latency`: which one is measured, time to the first token or to the last."""

    def __init__(
        self,
        timeout_ms: float = 2000.0,
        backoff: float = 0.9,
        start: int = 20,
        least: int = 1,
        most: int = 1000,
        latency: Latency = "ttft",
    ) -> None:
        super().__init__(start, least, most, latency)
        if not 0 < timeout_ms < float("inf"):
            raise ValueError(f"timeout_ms is {timeout_ms}; expected a finite number above 0")
        if not 0 < backoff < 1:
            raise ValueError(f"backoff is {backoff}; expected a share between 0 and 1")
        self._timeout, self._backoff = timeout_ms * 1e6, backoff

    def react(self, latency: int, dropped: bool) -> float:
        if dropped or latency > self._timeout:
            return int(self.limit * self._backoff)
        return self.limit + 1 if 2 * self.in_flight >= self.limit else self.limit
