"""andes: KV memory goes to those whose readers gain most by it, by quality of experience.

Rule: a reader takes in tokens from arrival + TTFT objective on, one each TPOT objective. What serving a request
gains is the share of the tokens its reader will have wanted by the end of the next `horizon_s` that the horizon
can bring; what it costs is its KV. While everything fits it is fcfs. When a waiting request lacks a slot or blocks,
the one of most gain for a token of KV (of the first 64 by arrival) comes next, and displaces running ones that
would gain nothing, the largest first; nobody who was preempted `cap` times is displaced.
Origin: the greedy knapsack of Andes (arXiv 2404.16283), its expected-delivery curve reduced to the tokens wanted at
the horizon, and its preemptions to those that no reader notices. Wins: under bursts, readers slower than the engine
lend their memory out. Loses: each loan is computed again or swapped, the more the shorter the horizon.
Cost: O(running log running) a step, with a look at 64 of the waiting when they don't fit.
"""

from __future__ import annotations

from lab.policy import RequestView, Shortage, Step
from policies.scheduling.common import QueueingPolicy, run_in_order

WINDOW = 64


class Andes(QueueingPolicy):
    """`ttft_s` and `tpot_s` stand in for objectives that a request doesn't have."""

    def __init__(
        self, horizon_s: float = 8.0, cap: int = 1, ttft_s: float = 1.0, tpot_s: float = 0.2
    ) -> None:
        super().__init__()
        for name, value in (("horizon_s", horizon_s), ("ttft_s", ttft_s), ("tpot_s", tpot_s)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; expected more than 0")
        if cap < 0:
            raise ValueError(f"cap is {cap}; expected at least 0")
        self.horizon, self.cap = round(horizon_s * 1e9), cap
        self.ttft, self.tpot = round(ttft_s * 1e9), round(tpot_s * 1e9)

    def gain(self, request: RequestView, step: Step, pace: int) -> float:
        """Gain for each token of KV, when a step takes `pace` nanoseconds."""
        tpot = max(self.tpot if request.tpot_slo is None else request.tpot_slo, 1)
        reading = step.now + self.horizon - request.arrival
        reading -= self.ttft if request.ttft_slo is None else request.ttft_slo
        read = min(max(reading, 0) / tpot, request.expected_output)
        wanted = max(read - request.generated, 0.0)
        return min(wanted, self.horizon / max(pace, 1)) / max(read, 1.0) / request.known

    def schedule(self, step: Step) -> None:
        running = list(step.running.values())
        if self.cap and self.queue and not self.fits(step, step.waiting[self.queue.peek()], []):
            running = self.displace(step, running)
        if run_in_order(step, running) and len(running) == len(step.running):
            self.admit_while_it_fits(step)

    def fits(self, step: Step, head: RequestView, without: list[RequestView]) -> bool:
        return step.slots_left + len(without) > 0 and step.fits_without(head, without)

    def displace(self, step: Step, running: list[RequestView]) -> list[RequestView]:
        """Let the one that gains most in, if need be at the cost of others; returns those still to be served."""
        pace = step.estimate(0, len(running), sum(request.known for request in running))
        waiting = [step.waiting[name] for name in self.queue.first(WINDOW)]
        best = max(waiting, key=lambda view: (self.gain(view, step, pace), -view.arrival, -view.seq))
        grant = step.run(best)
        if grant:
            self.queue.remove(best.id)
        if grant.short not in (Shortage.SLOTS, Shortage.BLOCKS):
            return running
        if not self.gain(best, step, pace):
            return running
        idle = [r for r in running if r.preemptions < self.cap and not self.gain(r, step, pace)]
        idle.sort(key=lambda request: (-request.known, request.arrival, request.seq))
        count = next((n for n in range(1, len(idle) + 1) if self.fits(step, best, idle[:n])), 0)
        for request in idle[:count]:
            step.preempt(request)
        if count and step.run(best):
            self.queue.remove(best.id)
        return [request for request in running if request.id in step.running]
