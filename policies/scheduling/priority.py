"""priority: the most important first, and at the cost of those less important that already run.

Rule: running and waiting are served in one order of (priority - ageing_per_s x seconds since arrival, arrival),
least first. A waiting request that lacks a slot or KV blocks preempts running ones that come after it and are
of strictly lower importance, the last first: age alone displaces nobody.
Origin: vLLM's priority scheduling (victim = largest (priority, arrival)), made preemptive for the waiting too.
Wins: tiers of service. Loses: without ageing the lowest tier starves under load; with it, a request that is d
levels below is overtaken only by those that came within d / ageing_per_s seconds. Preempted work is redone.
Cost: O(running log running) a step, O(log waiting) an admission.
"""

from __future__ import annotations

from lab.policy import RequestView, Step
from policies.keyed_heap import Key
from policies.scheduling.common import QueueingPolicy, run_merged


class Priority(QueueingPolicy):
    """Preemptive priorities; static if `ageing_per_s`, levels gained by a second of age, is 0."""

    def __init__(self, ageing_per_s: float = 0.0) -> None:
        super().__init__()
        if not 0 <= ageing_per_s < float("inf"):
            raise ValueError(f"ageing_per_s is {ageing_per_s}; expected at least 0")
        self.ageing = ageing_per_s

    def rank(self, request: RequestView) -> float:
        """All age alike, so the order by priority - ageing x age is that by priority + ageing x arrival."""
        return request.priority + self.ageing * request.arrival / 1e9

    def key(self, request: RequestView) -> Key:
        return (self.rank(request), request.arrival, request.seq)

    def displaces(self, head: RequestView, victim: RequestView) -> bool:
        return head.priority < victim.priority and self.rank(head) < self.rank(victim)

    def schedule(self, step: Step) -> None:
        run_merged(step, self.queue, self.key, self.displaces)
