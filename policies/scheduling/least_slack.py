"""least_slack: prompts by least slack, in chunks as large as the decodes' deadlines allow.

Rule: every decode runs in every step. Unfinished and waiting prompts follow in one order of slack: TTFT deadline
less the estimated time for what is uncached when the request begins to wait. Together they get the largest chunk
with which the step is estimated to end before the first deadline of a token (arrival + TTFT objective + one TPOT
objective a token; a decode already late asks for one TPOT objective), and at least `floor` tokens.
Origin: least laxity first (Dertouzos and Mok 1989); dynamic chunking from QoServe (arXiv 2503.22562).
Wins: mixed objectives: chunks are large when decodes can afford it. Loses: errors of the estimate, which is
learnt from the steps so far and knows no bound before the first; in overload all are late together.
Cost: O(running log running) a step, O(log waiting) and a look-up of the prefix an admission.
"""

from __future__ import annotations

from bisect import bisect_right

from lab.policy import NEVER, How, RequestId, RequestView, Step
from policies.keyed_heap import Key
from policies.scheduling.common import QueueingPolicy, is_decode, run_merged


class LeastSlack(QueueingPolicy):
    """Requests without objectives come last and hold nobody back."""

    def __init__(self, floor: int = 16) -> None:
        super().__init__()
        if floor < 1:
            raise ValueError(f"floor is {floor}; expected at least 1")
        self.floor = floor
        self.fresh: dict[RequestId, RequestView] = {}
        self.slack: dict[RequestId, int] = {}

    def deadline(self, request: RequestView) -> int:
        """When its next token is due."""
        if request.generated == 0:
            return NEVER if request.ttft_slo is None else request.arrival + request.ttft_slo
        if request.tpot_slo is None:
            return NEVER
        return request.arrival + (request.ttft_slo or 0) + request.generated * request.tpot_slo

    def key(self, request: RequestView) -> Key:
        if is_decode(request):
            return (0, self.deadline(request), request.arrival, request.seq)
        return (1, self.slack[request.id], request.arrival, request.seq)

    def on_arrival(self, request: RequestView, now: int) -> None:
        self.fresh[request.id] = request

    def on_preempt(self, request: RequestView, how: How, now: int) -> None:
        self.fresh[request.id] = request

    def on_finish(self, request: RequestView, reason: str, now: int) -> None:
        super().on_finish(request, reason, now)
        _ = self.fresh.pop(request.id, None), self.slack.pop(request.id, None)

    def chunk(self, step: Step, decodes: list[RequestView]) -> int:
        """Prompt tokens that the decodes leave room for in this step."""
        context = sum(request.known for request in decodes)
        due = NEVER
        for request in decodes:
            left = self.deadline(request) - step.now
            due = min(due, left if left > 0 else request.tpot_slo or 0)
        took = lambda tokens: step.estimate(tokens, len(decodes), context + tokens)  # noqa: E731
        return max(bisect_right(range(step.token_budget + 1), due, key=took) - 1, self.floor)

    def schedule(self, step: Step) -> None:
        for request in self.fresh.values():
            uncached = request.known - max(step.cached(request), request.computed)
            if request.generated or request.id not in self.slack:  # else unfinished prompts could swap places
                self.slack[request.id] = self.deadline(request) - step.estimate(uncached, 0, uncached)
            self.queue.push(request.id, self.key(request))
        self.fresh.clear()
        decodes = [request for request in step.running.values() if is_decode(request)]
        chunk = self.chunk(step, decodes)

        def most(request: RequestView) -> int:
            prompts = step.token_budget - step.tokens_left - sum(decode.granted for decode in decodes)
            return 1 if is_decode(request) else chunk - prompts

        run_merged(step, self.queue, self.key, lambda head, victim: False, most)
