"""mc_sf: memory-constrained shortest first: short requests first, if memory will suffice to the end of all.

Rule: what runs goes on. Waiting requests are taken by expected output, least first, as long as at every instant
at which one of them is foreseen to end, the KV blocks of all still active fit the cache; the first that fails
ends the round. Prompts are computed whole, so that each running request gets a token in each step and the
forecast holds; one longer than the whole budget goes in pieces, and counts with all it will ever hold until it
is computed. If predictions are exact, nobody is ever preempted (shared prefixes count for each that shares).
Origin: Jaillet et al., arXiv 2502.07115. Wins: mean latency, near the hindsight optimum.
Loses: long requests starve; low predictions lead to preemptions.
Cost: O(running^2) an admission.
"""

from __future__ import annotations

from lab.policy import RequestView, Step
from policies.keyed_heap import Key
from policies.scheduling.common import QueueingPolicy, is_decode, run_in_order

Forecast = tuple[int, int, int]
"""Steps to its end, tokens held in the coming step, and tokens that each later step adds."""


class MemoryConstrainedShortest(QueueingPolicy):
    """`by_arrival` takes the waiting in order of arrival instead, under the same test of memory."""

    def __init__(self, by_arrival: bool = False) -> None:
        super().__init__()
        self.by_arrival = by_arrival

    def key(self, request: RequestView) -> Key:
        expected = 0 if self.by_arrival else request.expected_output
        return (expected, request.arrival, request.seq)

    def forecast(self, request: RequestView, at_once: bool) -> Forecast:
        """`at_once`: all it knows is computed after this step, so it gets a token in each from now on."""
        left = request.expected_output - request.generated
        if at_once:
            return (left, request.known, 1)
        return (1 << 60, request.known + left - 1, 0)

    def suffices(self, active: list[Forecast], step: Step) -> bool:
        size = step.block_size
        for end, _, _ in active:
            then = min(end, max((e for e, _, growing in active if growing), default=1))
            blocks = sum(
                -(-(held + growing * (then - 1)) // size) for e, held, growing in active if e >= then
            )
            if blocks > step.blocks_total:
                return False
        return True

    def schedule(self, step: Step) -> None:
        running = list(step.running.values())
        active = [self.forecast(request, is_decode(request)) for request in running]
        if not run_in_order(step, running):
            return
        while self.queue and step.slots_left and step.tokens_left:
            head = step.waiting[self.queue.peek()]
            whole = head.known <= step.token_budget
            active.append(self.forecast(head, whole))
            if len(active) > 1 and not self.suffices(active, step):  # alone, any forecast must do
                break
            if not step.run(head, whole=whole):
                break
            self.queue.pop()
