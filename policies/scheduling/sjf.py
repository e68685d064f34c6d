"""sjf: shortest job first: of the waiting, the one with the least expected output.

Rule: as fcfs, but the queue is ordered by expected output length; what runs is not interrupted for it.
Origin: textbook; M/G/1 non-preemptive SJF is its closed form. Needs a length prediction (the true length in
an experiment that forces it). Wins: mean latency under load. Loses: long requests wait, without bound.
Cost: O(running) a step, O(log waiting) an admission.
"""

from __future__ import annotations

from lab.policy import RequestView, Step
from policies.keyed_heap import Key
from policies.scheduling.common import QueueingPolicy, repeat_if_settled, run_running


class ShortestJobFirst(QueueingPolicy):
    """Non-preemptive."""

    def key(self, request: RequestView) -> Key:
        return (request.expected_output, request.arrival, request.seq)

    def schedule(self, step: Step) -> None:
        if run_running(step):
            self.admit_while_it_fits(step)
            repeat_if_settled(step, self.queue)
