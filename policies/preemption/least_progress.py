"""least_progress: whoever has been computed least gives way.

Rule: victim = fewest computed tokens; the latest arrival among equals.
Origin: folklore; least work lost. Wins: little is recomputed. Loses: frees little at a time, so more are preempted,
and newcomers make no headway under pressure. Cost: O(candidates).
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.policy import RequestView, Step
from policies.preemption.common import WithMode


class LeastProgress(WithMode):
    """By (computed, -arrival, -seq)."""

    def victim(self, candidates: Sequence[RequestView], step: Step) -> RequestView:
        return min(candidates, key=lambda request: (request.computed, -request.arrival, -request.seq))
