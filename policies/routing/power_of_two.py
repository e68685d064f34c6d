"""power_of_two: draw two replicas at random, take the one with fewer requests.

Rule: `d` different replicas, uniform; min (waiting + running) among them, the lowest index among equals.
Origin: Mitzenmacher; Vvedenskaya, Dobrushin, Karpelevich 1996: with many servers E[T] = sum rho^(2^i - 2) for d = 2.
Wins: nearly as good as the shortest queue for a fraction of the look-ups, and far better when views are stale.
Loses: blind to sizes and caches; to the shortest queue when views are current. Cost: O(d).
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.policy import ReplicaView, Request, RoutingPolicy
from policies.routing.common import least


class PowerOfTwo(RoutingPolicy):
    """`d`: how many are drawn; 1 is `random`."""

    def __init__(self, d: int = 2) -> None:
        if d < 1:
            raise ValueError(f"d is {d}; expected at least 1")
        self._d = d

    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        drawn = self.rng.sample(replicas, min(self._d, len(replicas)))
        chosen = least(drawn, lambda replica: replica.requests)
        return chosen.index, f"fewest requests of {len(drawn)} drawn: {chosen.requests}"
