"""largest_kv: whoever frees most KV blocks gives way.

Rule: victim = most blocks that only it holds; the latest arrival among equals.
Origin: folklore; fewest victims for a need. Wins: few preemptions. Loses: throws away the most work, and long
requests starve. Cost: O(blocks of all candidates).
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.policy import RequestView, Step
from policies.preemption.common import WithMode


class LargestKv(WithMode):
    """By (blocks freed, arrival, seq)."""

    def victim(self, candidates: Sequence[RequestView], step: Step) -> RequestView:
        return max(candidates, key=lambda request: (step.frees(request), request.arrival, request.seq))
