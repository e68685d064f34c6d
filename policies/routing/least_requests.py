"""least_requests: the replica with the fewest requests, waiting and running.

Rule: min (waiting + running); the lowest index among equals.
Origin: join the shortest queue. Wins: close to the best possible for equal requests under current views.
Loses: requests differ in length; under stale views everybody runs to the same replica. Cost: O(replicas).
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.policy import ReplicaView, Request, RoutingPolicy
from policies.routing.common import least


class LeastRequests(RoutingPolicy):
    """Join the shortest queue."""

    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        chosen = least(replicas, lambda replica: replica.requests)
        return chosen.index, f"fewest requests: {chosen.requests}"
