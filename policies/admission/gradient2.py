"""gradient2: a limit on requests in flight that follows the ratio of usual to current latency.

Rule: on each end g = clamp(tolerance * long / short, 0.5, 1) with `short` this latency and `long` its running mean (of
all at first, exponential over `window` later); L' = 0.8 L + 0.2 (L g + 4), unless less than half of L is in flight.
A `long` of more than twice `short` decays by 5 %, so that overload is forgotten when it is over.
Origin: Gradient2Limit of Netflix's concurrency-limits. Wins: no timeout to choose. Loses: lengths of high variance look
like congestion; slow overload becomes usual, and only `most` stops it. Cost: O(1).
"""

from __future__ import annotations

from policies.admission.common import ConcurrencyLimit, Latency

QUEUE = 4
"""Requests allowed to queue: what keeps the limit growing while latency is as usual."""


class Gradient2(ConcurrencyLimit):
    """`latency`: which one is measured, time to the first token or to the last."""

    def __init__(
        self,
        tolerance: float = 1.5,
        window: int = 600,
        start: int = 20,
        least: int = 4,
        most: int = 200,
        latency: Latency = "ttft",
    ) -> None:
        super().__init__(start, least, most, latency)
        if not 1 <= tolerance < float("inf"):
            raise ValueError(f"tolerance is {tolerance}; expected a finite number, at least 1")
        if window < 1:
            raise ValueError(f"window is {window}; expected at least 1")
        self._tolerance, self._window = tolerance, window
        self._seen, self._long = 0, 0.0

    def react(self, latency: int, dropped: bool) -> float:
        short = max(latency, 1)
        self._seen += 1
        self._long += (short - self._long) * max(1 / self._seen, 2 / (self._window + 1))
        if self._long > 2 * short:
            self._long *= 0.95
        if 2 * self.in_flight < self.limit:
            return self.limit
        gradient = min(max(self._tolerance * self._long / short, 0.5), 1.0)
        return 0.8 * self.limit + 0.2 * (self.limit * gradient + QUEUE)
