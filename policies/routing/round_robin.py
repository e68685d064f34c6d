"""round_robin: each replica in turn.

Rule: the lowest index above the last one used; after the highest, the lowest.
Origin: the default of most load balancers. Wins: needs to know nothing, so stale views don't hurt; evens out
counts exactly. Loses: blind to sizes, to queues and to caches. Cost: O(replicas).
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.policy import ReplicaView, Request, RoutingPolicy


class RoundRobin(RoutingPolicy):
    """By index, not by position, so that turns go on when replicas come and go."""

    def __init__(self) -> None:
        self._last = -1

    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        indices = [replica.index for replica in replicas]
        later = [index for index in indices if index > self._last]
        self._last = min(later or indices)
        return self._last, "next in turn"
