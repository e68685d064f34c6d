"""lowest_priority: the least important gives way, the latest arrival among equals.

Rule: victim = largest (priority, arrival, seq); lower priority values are more important.
Origin: vLLM v1's priority scheduling. Wins: protects tiers under a scheduler that ignores them. Loses: the lowest
tier pays for everybody. Cost: O(candidates).
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.policy import RequestView, Step
from policies.preemption.common import WithMode


class LowestPriority(WithMode):
    """By (priority, arrival, seq)."""

    def victim(self, candidates: Sequence[RequestView], step: Step) -> RequestView:
        return max(candidates, key=lambda request: (request.priority, request.arrival, request.seq))
