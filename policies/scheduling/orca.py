"""orca: iteration-level batching that reserves a request's whole KV on admission, so nobody is preempted.

Rule: as fcfs, with prompts computed whole; a waiting request enters only if the blocks for its prompt and all
its output are free after what the running ones have still to grow. The output reserved is the expected one
(`exact`), that rounded up to a power of two (`pow2`), or `ceiling` tokens for everybody (`max`). Only output
beyond its reservation can lead to preemption.
Origin: Orca (OSDI'22); the three reservations are the baselines "Oracle", "Pow2", "Max" of vLLM (SOSP'23).
Wins: no work is ever lost. Loses: reserved memory lies idle, so batches are small; whole prompts stall decodes.
Cost: O(running) a step, O(log waiting) an admission.
"""

from __future__ import annotations

from typing import Literal

from lab.policy import RequestView, Step
from policies.scheduling.common import QueueingPolicy, run_in_order


class Orca(QueueingPolicy):
    """A prompt longer than the whole token budget is computed in pieces."""

    def __init__(self, reserve: Literal["exact", "pow2", "max"] = "exact", ceiling: int = 2048) -> None:
        super().__init__()
        if reserve not in ("exact", "pow2", "max"):
            raise ValueError(f"reserve is {reserve!r}; expected 'exact', 'pow2' or 'max'")
        if ceiling < 1:
            raise ValueError(f"ceiling is {ceiling}; expected at least 1")
        self.reserve, self.ceiling = reserve, ceiling

    def reach(self, request: RequestView, step: Step) -> int:
        """Tokens of KV that it may come to hold. The last token is never fed back, so it needs none."""
        output = request.expected_output
        if self.reserve == "pow2":
            output = 1 << (output - 1).bit_length()
        elif self.reserve == "max":
            output = max(output, self.ceiling)
        return min(request.prompt_tokens + output - 1, step.blocks_total * step.block_size)

    def schedule(self, step: Step) -> None:
        running = list(step.running.values())
        if not run_in_order(step, running):
            return

        def growth(request: RequestView) -> int:
            return step.blocks_for(request, self.reach(request, step) - request.computed)

        promised = sum(growth(request) for request in running)
        while self.queue:
            head = step.waiting[self.queue.peek()]
            to_come = self.reach(head, step) - max(step.cached(head), head.computed)
            if step.blocks_for(head, to_come) + promised > step.blocks_left:
                break
            if not step.run(head, whole=head.known <= step.token_budget):
                break
            self.queue.pop()
            promised += growth(head)
