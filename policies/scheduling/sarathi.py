"""sarathi: stall-free batching: every decode in every step, and prompts only in what is left of a small chunk.

Rule: (1) all decodes, one token each; (2) unfinished prompts, in order of admission, and (3) new ones by
arrival, each getting min(remaining, chunk - tokens in the step so far), until one doesn't fit. A new one needs KV
blocks for its whole prompt, beside what unfinished ones have still to take. When KV runs short, unfinished prompts
are preempted before decodes, the last admitted first.
Origin: Sarathi-Serve (OSDI'24). Wins: a step is never longer than a full chunk's, which bounds the time
between tokens. Loses: a small chunk raises the time to first token and reads a prompt's KV again for each.
Cost: O(running) a step, O(log waiting) an admission.
"""

from __future__ import annotations

from lab.policy import RequestView, Step
from policies.scheduling.common import QueueingPolicy, is_decode, run_in_order


class Sarathi(QueueingPolicy):
    """`chunk` is the step's token budget, decodes included: the tau of the paper."""

    def __init__(self, chunk: int = 256) -> None:
        super().__init__()
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; expected at least 1")
        self.chunk = chunk

    def schedule(self, step: Step) -> None:
        def most(request: RequestView) -> int:
            # Never short for a decode: each had a token in the step before, and that had no more than a chunk.
            return self.chunk - (step.token_budget - step.tokens_left)

        order = sorted(step.running.values(), key=lambda request: not is_decode(request))
        if not run_in_order(step, order, most):
            return
        promised = sum(self.missing(request, step) for request in order)
        while self.queue and step.slots_left:
            head = step.waiting[self.queue.peek()]
            tokens, rest = most(head), head.known - max(step.cached(head), head.computed)
            if tokens < 1 or step.blocks_for(head, rest) + promised > step.blocks_left:
                break
            if not step.run(head, tokens):
                break
            self.queue.pop()
            promised += self.missing(head, step)

    def missing(self, request: RequestView, step: Step) -> int:
        """Blocks that it has still to take for what it knows."""
        return step.blocks_for(request, request.remaining)
