"""prefix_cost: weigh what the cache saves against what a replica is busy with.

Rule: cost = `weight` * (tokens to prefill there: queued, and of this prompt those not cached) + tokens with KV there;
the least cost, or with a `temperature` drawn by softmax over costs scaled to [0, 1].
Origin: the KV-aware router of NVIDIA Dynamo, which counts blocks; tokens here, the same up to rounding.
Wins: shared prefixes and uneven load at once. Loses: the weight needs tuning; without a temperature it herds under
stale views. Cost: O(replicas) look-ups of the prompt's blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lab.policy import ReplicaView, Request, RoutingPolicy
from policies.routing.common import least, uncached


class PrefixCost(RoutingPolicy):
    """`weight` of prefill against KV held; `temperature` 0 takes the least cost."""

    def __init__(self, weight: float = 1.0, temperature: float = 0.0) -> None:
        for name, value in (("weight", weight), ("temperature", temperature)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; expected a finite number, at least 0")
        self._weight, self._temperature = weight, temperature

    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        cost = {
            replica.index: self._weight * (replica.tokens_to_compute + uncached(request, replica))
            + replica.context_tokens
            for replica in replicas
        }
        chosen = least(replicas, lambda replica: cost[replica.index])
        low, high = cost[chosen.index], max(cost.values())
        if self._temperature and high > low:
            weights = [
                math.exp((low - cost[replica.index]) / (high - low) / self._temperature)
                for replica in replicas
            ]
            chosen = self.rng.choices(replicas, weights)[0]
        return chosen.index, f"cost {cost[chosen.index]:g} tokens, least {low:g}"
