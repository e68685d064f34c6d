"""spf: shortest prompt first: of the waiting, the one with the fewest prompt tokens that aren't cached.

Rule: as fcfs, but the queue is ordered by uncached tokens, looked up once when a request begins to wait and
again when it comes to the head; what runs is not interrupted. Origin: classic SJF on the part of the size that
is known. Wins: mean time to first token, without any prediction. Loses: long prompts, without bound; output
lengths are ignored. A prefix that gets cached while its request is deep in the queue goes unnoticed.
Cost: O(running) a step, O(log waiting) and a look-up of the prefix an admission.
"""

from __future__ import annotations

from lab.policy import How, RequestView, Step
from policies.keyed_heap import Key
from policies.scheduling.common import QueueingPolicy, run_running

LOOKS = 8
"""Heads looked up again for an admission: keys move as the cache does, and this must end."""


class ShortestPromptFirst(QueueingPolicy):
    """Non-preemptive."""

    def __init__(self) -> None:
        super().__init__()
        self.fresh: dict[str, RequestView] = {}

    def on_arrival(self, request: RequestView, now: int) -> None:
        self.fresh[request.id] = request

    def on_preempt(self, request: RequestView, how: How, now: int) -> None:
        self.fresh[request.id] = request

    def on_finish(self, request: RequestView, reason: str, now: int) -> None:
        super().on_finish(request, reason, now)
        self.fresh.pop(request.id, None)

    def schedule(self, step: Step) -> None:
        ran = run_running(step)
        for request in self.fresh.values():
            self.queue.push(request.id, self.uncached(step, request))
        self.fresh.clear()
        while ran and self.queue and step.slots_left and step.tokens_left:
            for _ in range(LOOKS):
                head = step.waiting[self.queue.peek()]
                current = self.uncached(step, head)
                if current == self.queue.peek_key():
                    break
                self.queue.push(head.id, current)
            if not step.run(self.queue.peek()):
                break
            self.queue.pop()

    def uncached(self, step: Step, request: RequestView) -> Key:
        tokens = request.known - max(step.cached(request), request.computed)
        return (tokens, request.arrival, request.seq)
