"""ltr: learning to rank: whoever is expected to end first runs, by a score of which only the order counts.

Rule: running and waiting are served in one order of the score, which is the expected output as foreseen on
arrival and is never corrected; a waiting request preempts running ones of a higher score. One that has waited
`starve` steps on end is put before all others until it has generated `period` tokens.
Origin: vLLM-LTR (arXiv 2408.15792), whose ranker is `predictor` here. Wins: near sjf with nothing but a
ranking. Loses: the predictor's errors, and preemptions. The put-forward displace others, but nobody displaces
them, so whoever displaced another gets a token before it can be displaced back.
Cost: O(running log running) a step, O(log waiting) an admission.
"""

from __future__ import annotations

from lab.policy import How, RequestId, RequestView, Step
from policies.keyed_heap import Key
from policies.scheduling.common import Patience, QueueingPolicy, run_merged


class LearningToRank(QueueingPolicy):
    """`starve=0` puts nobody forward; nobody who was preempted `cap` times is displaced."""

    def __init__(self, starve: int = 256, period: int = 16, cap: int = 1) -> None:
        super().__init__()
        if starve < 0:
            raise ValueError(f"starve is {starve}; expected at least 0")
        if period < 1:
            raise ValueError(f"period is {period}; expected at least 1")
        self.patience, self.period = Patience(starve), period
        if cap < 0:
            raise ValueError(f"cap is {cap}; expected at least 0")
        self.steps, self.cap = 0, cap
        self.score: dict[RequestId, int] = {}
        self.forward: dict[RequestId, int] = {}  # tokens left to generate before all others

    def key(self, request: RequestView) -> Key:
        return (request.id not in self.forward, self.score[request.id], request.arrival, request.seq)

    def on_arrival(self, request: RequestView, now: int) -> None:
        self.score[request.id] = request.expected_output
        self.wait(request)

    def on_preempt(self, request: RequestView, how: How, now: int) -> None:
        self.wait(request)

    def wait(self, request: RequestView) -> None:
        self.queue.push(request.id, self.key(request))
        self.patience.begins(request, self.steps)

    def on_tokens(self, request: RequestView, computed: int, generated: int, now: int) -> None:
        if request.id in self.forward:
            self.forward[request.id] -= generated
            if self.forward[request.id] < 1:
                del self.forward[request.id]

    def on_finish(self, request: RequestView, reason: str, now: int) -> None:
        super().on_finish(request, reason, now)
        del self.score[request.id]
        self.forward.pop(request.id, None)

    def displaces(self, head: RequestView, victim: RequestView) -> bool:
        spared = victim.id in self.forward or victim.preemptions >= self.cap
        return not spared and self.key(head)[:2] < self.key(victim)[:2]

    def schedule(self, step: Step) -> None:
        self.steps += 1
        for request in self.patience.over(self.steps - 1, self.queue):
            self.forward[request.id] = self.period
            self.queue.push(request.id, self.key(request))
        run_merged(step, self.queue, self.key, self.displaces)
