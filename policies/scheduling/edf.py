"""edf: earliest deadline first.

Rule: a request's deadline is arrival + its TTFT objective until its first token, and one TPOT objective
later for each token after that; running and waiting are served in one order of deadlines. Requests without
objectives come last. KV shortage preempts the latest deadline; the waiting displace nobody.
Origin: Liu and Layland 1973; with these two deadlines in SLO-aware serving (e.g. QoServe).
Wins: light and medium load. Loses: in overload everybody misses by a little (the domino effect).
Cost: O(running log running) a step, O(log waiting) an admission.
"""

from __future__ import annotations

from lab.policy import RequestView, Step
from policies.keyed_heap import Key
from policies.scheduling.common import QueueingPolicy, run_merged

NEVER = 1 << 62


class EarliestDeadlineFirst(QueueingPolicy):
    """Deadlines from the requests' own TTFT and TPOT objectives."""

    def key(self, request: RequestView) -> Key:
        deadline = NEVER
        if request.generated == 0 and request.ttft_slo is not None:
            deadline = request.arrival + request.ttft_slo
        elif request.generated and request.tpot_slo is not None:
            deadline = request.arrival + (request.ttft_slo or 0) + request.generated * request.tpot_slo
        return (deadline, request.arrival, request.seq)

    def schedule(self, step: Step) -> None:
        run_merged(step, self.queue, self.key, lambda head, victim: False)
