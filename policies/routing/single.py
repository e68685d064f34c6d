"""single: everything goes to the first replica."""

from __future__ import annotations

from collections.abc import Sequence

from lab.policy import ReplicaView, Request, RoutingPolicy


class Single(RoutingPolicy):
    """O(1)."""

    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        return replicas[0].index, "single"
