"""psjf: preemptive shortest job first: as srpt, but by the whole size, however much is done already.

Rule: size is prefill_cost x prompt tokens + expected output; who is displaced must be larger by at least the prompt
that is lost, at its cost. Origin: textbook; M/G/1 PSJF is its closed form.
Wins: close to srpt, and order among requests never changes. Loses: a long request nearly done is put off.
Cost: O(running log running) a step, O(log waiting) an admission.
"""

from __future__ import annotations

from lab.policy import RequestView
from policies.scheduling.srpt import ShortestRemaining


class PreemptiveShortestJob(ShortestRemaining):
    """By original size."""

    def size(self, request: RequestView) -> float:
        return self.prefill_cost * request.prompt_tokens + request.expected_output
