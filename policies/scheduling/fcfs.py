"""fcfs: first come, first served, with continuous batching and chunked prefill.

Rule: running requests first (decodes, one token each, then unfinished prompts, their next chunk; each kind in
order of admission); then waiting ones by arrival, until the first that doesn't fit; none in a step that preempted. When
KV runs short the last admitted is preempted. A running request's demand never grows, so whoever was
admitted keeps being served: decodes can't starve behind prompts.
Origin: the unified token budget of vLLM v1's scheduler (Orca, OSDI'22, for iteration-level batching).
Wins: simple, nobody starves. Loses: a long prompt at the head blocks short ones; lengths of high variance.
Cost: O(running) a step, O(log waiting) an admission; with backfill a look at 32 of the waiting a step.
"""

from __future__ import annotations

from lab.policy import Shortage, Step
from policies.scheduling.common import QueueingPolicy, repeat_if_settled, run_running

WINDOW = 32


class Fcfs(QueueingPolicy):
    """The baseline. `backfill` passes over those that lack KV blocks, among the first 32 that wait: better
    used memory, but a large request may be overtaken without bound."""

    def __init__(self, backfill: bool = False) -> None:
        super().__init__()
        self.backfill = backfill

    def schedule(self, step: Step) -> None:
        if not run_running(step):
            return
        if not self.backfill:
            self.admit_while_it_fits(step)
            repeat_if_settled(step, self.queue)
            return
        for name in self.queue.first(WINDOW):
            grant = step.run(name)
            if grant:
                self.queue.remove(name)
            elif grant.short is not Shortage.BLOCKS:
                break
