"""least_tokens: the replica with the fewest tokens outstanding.

Rule: min (prompt tokens not yet computed + output tokens that the length predictor still expects).
Origin: least outstanding tokens, of serving gateways (vLLM's router, llm-d); in queueing, least work left.
Wins: sizes differ, and the predictor knows them. Loses: to a bad predictor; counts prompt and output tokens alike,
and tokens that the cache will supply; herds under stale views. Cost: O(replicas).
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.policy import ReplicaView, Request, RoutingPolicy
from policies.routing.common import least


def outstanding(replica: ReplicaView) -> int:
    """Tokens still to be put through the model there, as far as is foreseen."""
    return replica.tokens_to_compute + replica.tokens_expected


class LeastTokens(RoutingPolicy):
    """Least work left, in tokens."""

    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        chosen = least(replicas, outstanding)
        return chosen.index, f"fewest tokens: {outstanding(chosen)}"
