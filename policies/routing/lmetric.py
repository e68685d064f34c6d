"""lmetric: prefill tokens times batch size, the least product.

Rule: min (tokens to prefill there: queued, and of this prompt those not cached) * (requests there, this one included).
Origin: LMetric, "Simple is better" (Zhang et al., arXiv 2603.15202). In a product the weights of the two cancel.
Counting this request keeps the product above 0, so that idle replicas still differ by what they have cached.
Wins: cached prefixes and balance without a knob. Loses: herds under stale views. Cost: O(replicas) look-ups of the
prompt's blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.policy import ReplicaView, Request, RoutingPolicy
from policies.routing.common import least, uncached


class LMetric(RoutingPolicy):
    """Nothing to set."""

    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        product = {
            replica.index: (replica.tokens_to_compute + uncached(request, replica)) * (replica.requests + 1)
            for replica in replicas
        }
        chosen = least(replicas, lambda replica: product[replica.index])
        return chosen.index, f"tokens times requests {product[chosen.index]}"
