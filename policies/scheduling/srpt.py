"""srpt: shortest remaining processing time: whoever is nearest to its end runs, at the cost of those further off.

Rule: what remains is prefill_cost x uncomputed prompt tokens + expected output - generated tokens. Running and
waiting are served in one order of it; a waiting request that lacks a slot or blocks preempts running ones with
more to do, the furthest from their end first, by at least what preempting them costs.
Origin: Schrage and Miller 1966, optimal for mean latency at one server. Needs a length prediction; if that is
too low, a request stays one token from its end and can't be displaced.
Wins: mean latency, more so the more lengths vary. Loses: long requests under load; preempted work is computed
again. Who displaced another has less to do and stays ahead of it, so the two never change places.
Cost: O(running log running) a step, O(log waiting) an admission.
"""

from __future__ import annotations

from lab.policy import RequestView, Step
from policies.keyed_heap import Key
from policies.scheduling.common import QueueingPolicy, run_merged


class ShortestRemaining(QueueingPolicy):
    """`prefill_cost` is what computing a prompt token costs, in output tokens. Output tokens that a preemption
    lost are not counted: they are computed again in parallel."""

    def __init__(self, prefill_cost: float = 0.1) -> None:
        super().__init__()
        if not 0 <= prefill_cost < float("inf"):
            raise ValueError(f"prefill_cost is {prefill_cost}; expected at least 0")
        self.prefill_cost = prefill_cost

    def size(self, request: RequestView) -> float:
        prompt = max(request.prompt_tokens - request.computed, 0)
        return self.prefill_cost * prompt + request.expected_output - request.generated

    def key(self, request: RequestView) -> Key:
        return (self.size(request), request.arrival, request.seq)

    def schedule(self, step: Step) -> None:
        run_merged(step, self.queue, self.key, self.displaces)

    def displaces(self, head: RequestView, victim: RequestView) -> bool:
        """Whether that pays: the victim's prompt will have to be computed again."""
        lost = self.prefill_cost * min(victim.computed, victim.prompt_tokens)
        return self.size(head) + lost < self.size(victim)
