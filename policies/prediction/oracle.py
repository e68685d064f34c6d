"""oracle: the true output length, where the experiment forces it; the most it may be otherwise.

Wins: everything that orders by length, as an upper bound. Loses: nobody has it outside an experiment. O(1).
"""

from __future__ import annotations

from lab.policy import LengthPredictor, Request


class Oracle(LengthPredictor):
    """`request.output_limit`."""

    def predict(self, request: Request, now: int) -> int:
        return request.output_limit
