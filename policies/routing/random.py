"""random: any replica, each as likely as the others.

Rule: uniform. Origin: the baseline of every study of load balancing: n separate queues, each M/M/1 under Poisson
arrivals. Wins: no state, no herding. Loses: some queue grows while another replica idles. Cost: O(1).
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.policy import ReplicaView, Request, RoutingPolicy


class Random(RoutingPolicy):
    """Draws from the run's seeded stream."""

    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        return self.rng.choice(replicas).index, "random"
