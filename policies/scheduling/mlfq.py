"""mlfq: skip-join multi-level feedback queue: short requests finish early although nobody knows which are short.

Rule: level i is worth `quantum` x `growth`^i output tokens. A request joins the highest level worth its prefill
(prefill_cost x prompt tokens) and sinks one level whenever it has generated what its level is worth. Running
and waiting are served by (level, arrival); a waiting request preempts running ones of lower levels. One that
waited `promote_s` seconds on end goes before the top level, but displaces nobody.
Origin: FastServe (NSDI'26; skip-join by prefill time), with service counted in tokens, so that levels don't
depend on a clock. quantum=1 growth=1 prefill_cost=0 promote_s=0 is least attained service (FB).
Wins: heavy tails, lengths unknown. Loses: lengths without a tail (it shares the server, to no gain), and each
preemption costs a recomputation or swap. Only generated tokens sink a request, so whoever displaced another
has produced some before it can be displaced back.
Cost: O(running log running) a step, O(log waiting) an admission.
"""

from __future__ import annotations

from lab.policy import How, RequestView, Step
from policies.keyed_heap import Key
from policies.scheduling.common import Patience, QueueingPolicy, run_merged


class Mlfq(QueueingPolicy):
    """Levels are numbered from the top; there is always one more below."""

    def __init__(
        self, quantum: int = 16, growth: float = 2.0, prefill_cost: float = 0.1, promote_s: float = 3.0
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("quantum", quantum, 1),
            ("growth", growth, 1),
            ("prefill_cost", prefill_cost, 0),
            ("promote_s", promote_s, 0),
        ):
            if not least <= value < float("inf"):
                raise ValueError(f"{name} is {value}; expected at least {least}")
        self.quantum, self.growth, self.prefill_cost = quantum, growth, prefill_cost
        self.patience = Patience(round(promote_s * 1e9))
        self.level: dict[str, int] = {}
        self.left: dict[str, float] = {}  # tokens until it sinks

    def worth(self, level: int) -> float:
        return self.quantum * min(self.growth**level, 1e18)

    def key(self, request: RequestView) -> Key:
        return (self.level[request.id], request.arrival, request.seq)

    def on_arrival(self, request: RequestView, now: int) -> None:
        level = 0
        while self.growth > 1 and self.worth(level) < self.prefill_cost * request.prompt_tokens:
            level += 1
        self.level[request.id], self.left[request.id] = level, self.worth(level)
        self.wait(request, now)

    def on_preempt(self, request: RequestView, how: How, now: int) -> None:
        self.wait(request, now)

    def wait(self, request: RequestView, now: int) -> None:
        self.queue.push(request.id, self.key(request))
        self.patience.begins(request, now)

    def on_tokens(self, request: RequestView, computed: int, generated: int, now: int) -> None:
        self.left[request.id] -= generated
        if self.left[request.id] <= 0:
            self.level[request.id] += 1
            self.left[request.id] += self.worth(self.level[request.id])

    def on_finish(self, request: RequestView, reason: str, now: int) -> None:
        super().on_finish(request, reason, now)
        del self.level[request.id], self.left[request.id]

    def schedule(self, step: Step) -> None:
        for request in self.patience.over(step.now, self.queue):
            self.level[request.id], self.left[request.id] = -1, self.worth(0)
            self.queue.push(request.id, self.key(request))
        run_merged(step, self.queue, self.key, self.displaces)

    def displaces(self, head: RequestView, victim: RequestView) -> bool:
        return 0 <= self.level[head.id] < self.level[victim.id]
