"""cost_benefit: whoever costs least for each block it frees gives way.

Rule: victim = least (cheaper of recomputing and swapping) / blocks freed; the latest arrival among equals. One that
frees nothing comes last. Before step times are known, computed tokens stand for the time to compute them.
Origin: greedy knapsack, as in InferCept's minimum-waste rule. Wins: least time lost for the room gained.
Loses: needs step times; the same cheap victim may be hit again. Cost: O(blocks of all candidates).
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.policy import NEVER, RequestView, Step
from policies.preemption.common import Mode, WithMode, recompute_time, swap_time


class CostBenefit(WithMode):
    """By (cost per block, -arrival, -seq); its mode follows the break-even unless told otherwise."""

    def __init__(self, mode: Mode = "break_even") -> None:
        super().__init__(mode)

    def victim(self, candidates: Sequence[RequestView], step: Step) -> RequestView:
        def price(request: RequestView) -> tuple[float, int, int]:
            freed, again = step.frees(request), recompute_time(request, step)
            if self.mode != "recompute" and again and step.host_blocks_left:
                again = min(again, swap_time(request, step))
            cost = (again or request.computed) / freed if freed else NEVER
            return (cost, -request.arrival, -request.seq)

        return min(candidates, key=price)
