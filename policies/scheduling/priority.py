"""priority: the most important first, and at the cost of those less important that already run.

Rule: running and waiting are served in one order of (priority, arrival), lower priority values first. A
waiting request that lacks a slot or KV blocks preempts running ones of strictly lower importance, the least
important and latest first.
Origin: vLLM's priority scheduling (victim = largest (priority, arrival)), made preemptive for the waiting too.
Wins: tiers of service. Loses: the lowest tier starves under load; preempted work is computed again.
Cost: O(running log running) a step, O(log waiting) an admission.
"""

from __future__ import annotations

from lab.policy import RequestView, Step
from policies.keyed_heap import Key
from policies.scheduling.common import QueueingPolicy, run_merged


class Priority(QueueingPolicy):
    """Preemptive static priorities."""

    def key(self, request: RequestView) -> Key:
        return (request.priority, request.arrival, request.seq)

    def schedule(self, step: Step) -> None:
        run_merged(step, self.queue, self.key, lambda head, victim: victim.priority > head.priority)
